"""Scores of talking videos: LSE-D, LSE-C and Frechet distances."""
