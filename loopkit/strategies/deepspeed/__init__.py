"""The DeepSpeed strategy."""
