"""The Fisher matrix itself: as an operator, approximated, its diagonal, its spectrum and its geometry."""

from . import geometry as geometry
from . import plots as plots
from .approximations import approximate, dense
from .capacity import BlockSpectrum, block_spectra, effective_rank, participation_ratio
from .comparison import Comparison, compare
from .diagonal_fisher import DiagonalFisher
from .diagonals import diagonal
from .empirical_head import EmpiricalHead
from .head import HeadSolution, SoftmaxHead
from .importance import ImportanceShift, ewc_penalty, importance_shift
from .matrix import operator
from .operators import Operator
from .snapshots import to_device, to_host
from .spectra import Density, Spectrum, density, spectrum

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
