"""Prune, merge and trim models with the Fisher's help."""

from .masks import global_masks, mask
from .pruned import Pruned, output_error

__all__ = [
    "Pruned",
    "global_masks",
    "mask",
    "output_error",
]
