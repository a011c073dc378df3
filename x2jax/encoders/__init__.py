"""Frozen encoders: the autoencoder and the language models."""
