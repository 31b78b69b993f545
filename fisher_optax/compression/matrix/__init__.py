"""Prune one matrix."""
