"""What a step needs in memory, foreseen by running it with tensors that have shapes and no values."""
