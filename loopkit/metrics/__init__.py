"""Exact averages of logged values, and the metrics of an evaluation over all ranks."""
