"""Merge models that were tuned apart."""
