"""Compiles a training step without running it: memory, traffic, least time."""
