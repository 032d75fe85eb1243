"""Checkpoints: where they come from, how tensors are read, and which parameter each one fills."""
