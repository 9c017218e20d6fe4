"""``loopkit eject``: the plain PyTorch script of a run."""
