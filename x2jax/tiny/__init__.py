"""The tiny world: procedural editing data and the small model family that is trained on it."""
