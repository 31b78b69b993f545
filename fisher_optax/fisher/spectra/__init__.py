"""Eigenvalues of operators from products alone, and what they say."""
