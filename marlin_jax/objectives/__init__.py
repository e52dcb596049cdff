"""Objectives beside MARLIN's, each trained on the same forward pass."""
