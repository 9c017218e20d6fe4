"""Measurements of loopkit beside its peers; each file is one, run by itself."""
