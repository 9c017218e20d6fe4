"""Known models on one device: GPT-2 and ResNet-50, with loopkit, by hand and with the peers."""
