"""Tasks to read, to run and to start from; each file is one."""
