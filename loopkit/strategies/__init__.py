"""Where and how a task runs: devices, precision, clipping, sharding and state, behind Strategy."""
