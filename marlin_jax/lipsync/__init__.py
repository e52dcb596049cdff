"""Lip synchronisation: networks, training, generation and scoring."""
