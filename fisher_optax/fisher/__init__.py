"""The Fisher matrix itself: as an operator, approximated, its diagonal, its spectrum and its geometry."""

from .matrix import operator
from .operators import Operator

__all__ = ["Operator", "operator"]
