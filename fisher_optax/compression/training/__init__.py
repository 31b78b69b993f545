"""Prune while training."""
