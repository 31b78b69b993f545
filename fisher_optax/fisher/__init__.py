"""The Fisher matrix itself: as an operator, approximated, its diagonal, its spectrum and its geometry."""

from . import geometry as geometry
from . import plots as plots
from .diagonals.diagonal import diagonal
from .diagonals.diagonal_fisher import DiagonalFisher
from .diagonals.importance import ImportanceShift, ewc_penalty, importance_shift
from .diagonals.snapshots import to_device, to_host
from .head.empirical import EmpiricalHead
from .head.softmax import HeadSolution, SoftmaxHead
from .operators.approximations import approximate, dense
from .operators.matrix import operator
from .operators.operator import Operator
from .spectra.capacity import BlockSpectrum, block_spectra, effective_rank, participation_ratio
from .spectra.comparison import Comparison, compare
from .spectra.spectrum import Density, Spectrum, density, spectrum

__all__ = [
    "BlockSpectrum",
    "Comparison",
    "Density",
    "DiagonalFisher",
    "EmpiricalHead",
    "HeadSolution",
    "ImportanceShift",
    "Operator",
    "SoftmaxHead",
    "Spectrum",
    "approximate",
    "block_spectra",
    "compare",
    "dense",
    "density",
    "diagonal",
    "effective_rank",
    "ewc_penalty",
    "geometry",
    "importance_shift",
    "operator",
    "participation_ratio",
    "plots",
    "spectrum",
    "to_device",
    "to_host",
]
