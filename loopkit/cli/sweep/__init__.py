"""Train with several values of some options, and compare."""
