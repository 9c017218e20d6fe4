"""Parsing of a command line: tokens, configs, types, the target, and help."""
