"""Downstream learning: labels, splits, features, heads, scores."""
