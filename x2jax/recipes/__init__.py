"""Recipes: what trains, on what, towards what. The loop, step and checkpoints are shared."""
