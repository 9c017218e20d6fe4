"""Fit, and what opens, saves, resumes and closes a run."""
