"""Parsing of a command line: tokens, options, configuration files, the target."""
