"""Facial-video masked autoencoder pretraining in JAX."""
