"""Factors x decomposition x application: the preconditioner behind the named optimizers."""
