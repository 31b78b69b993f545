"""Flax models of the experiments."""
