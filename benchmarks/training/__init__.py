"""Losses of training runs, each method at its best rate."""
