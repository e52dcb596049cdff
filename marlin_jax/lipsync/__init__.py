"""Lip synchronisation: what the binary eval/ls.py is made of."""
