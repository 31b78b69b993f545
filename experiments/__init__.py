"""Longer programs than a user copies: comparisons, pictures, image runs. `python -m experiments.NAME --help`."""
