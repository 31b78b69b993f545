"""Prune a model, layer by layer."""
