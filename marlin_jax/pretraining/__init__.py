"""The paper: masking, losses, the training step and its schedule."""
