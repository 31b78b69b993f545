"""Flax models of the examples."""
