"""``loopkit plan``: foresee the memory of a run."""
