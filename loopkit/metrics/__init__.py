"""Averages that never wait for the device, and evaluation that counts each sample once."""
