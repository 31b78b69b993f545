"""Wrappers of Optax transformations, each usable alone."""
