"""x2jax: train and share instruction-editing adapters for FLUX.1, in JAX."""

__version__ = "0.1.0"
