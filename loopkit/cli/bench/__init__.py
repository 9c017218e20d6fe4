"""``loopkit bench``: time and memory of a task, each run measured in a process of its own."""
