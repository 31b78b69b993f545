"""Fisher-based and matrix-aware optimizers for JAX, as composable Optax transformations."""

from . import applications as applications
from . import decompositions as decompositions
from . import factors as factors
from . import linalg as linalg
from .applications import in_eigenbasis
from .axes import MatrixAxes, label_params
from .checks import static_args as _static_args
from .decay import add_cautious_decay, add_decay_after_step
from .grafting import graft
from .linalg import jordan, polar_express, you
from .optimizers.dykaf import dykaf, scale_by_dykaf
from .optimizers.kl import kl_shampoo, kl_soap, scale_by_kl_shampoo, scale_by_kl_soap
from .optimizers.muon import muon, scale_by_muon, scale_by_normuon
from .optimizers.shampoo import scale_by_shampoo, shampoo
from .optimizers.soap import scale_by_soap, soap
from .precondition import precondition
from .reporting import Health, Report, Row, check_state, health, report
from .warm_start import from_adam

# For optax.inject_hyperparams(fo.soap, static_args=fo.STATIC_ARGS["soap"]): only numbers are ever traced.
_FACTORIES = (
    *(soap, scale_by_soap, muon, scale_by_muon, dykaf, scale_by_dykaf),
    *(shampoo, scale_by_shampoo),
    *(kl_shampoo, scale_by_kl_shampoo, kl_soap, scale_by_kl_soap),
)
STATIC_ARGS = {f.__name__: _static_args(f) for f in _FACTORIES}

__all__ = [
    "STATIC_ARGS",
    "Health",
    "MatrixAxes",
    "Report",
    "Row",
    "add_cautious_decay",
    "add_decay_after_step",
    "applications",
    "check_state",
    "decompositions",
    "dykaf",
    "factors",
    "from_adam",
    "graft",
    "health",
    "in_eigenbasis",
    "jordan",
    "kl_shampoo",
    "kl_soap",
    "label_params",
    "linalg",
    "muon",
    "polar_express",
    "precondition",
    "report",
    "scale_by_dykaf",
    "scale_by_kl_shampoo",
    "scale_by_kl_soap",
    "scale_by_muon",
    "scale_by_normuon",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "soap",
    "you",
]
