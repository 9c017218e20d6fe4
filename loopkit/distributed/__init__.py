"""Ranks, the processes that train together: start them, exchange values, report a failure."""
