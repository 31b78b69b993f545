"""The products of a program, counted by `experiments.flops`."""

from experiments.flops import FACTORISATIONS, FlopCount, count_matmul_flops

__all__ = ["FACTORISATIONS", "FlopCount", "count_matmul_flops"]
