"""Frozen image transformers and the small trainable parts that make them understand video."""
