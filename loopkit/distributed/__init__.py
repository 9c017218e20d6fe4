"""Processes that train together: starting them, collectives, noticing that one has failed."""
