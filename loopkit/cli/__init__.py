"""The command line: one module for each command, ``args`` to parse and ``bench`` to measure."""
