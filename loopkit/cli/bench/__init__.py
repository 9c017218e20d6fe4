"""`loopkit bench`: precision, memory and speed measured by a worker process."""
