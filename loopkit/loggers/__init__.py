"""Loggers: destinations of logged values. Each imports its packages when it is asked for."""
