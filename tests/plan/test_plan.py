"""The plan of a step's memory is what the allocator gives out in a real one."""
