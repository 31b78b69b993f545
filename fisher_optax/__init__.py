"""Fisher-based and matrix-aware optimizers for JAX, as composable Optax transformations."""

from typing import Any as _Any

from . import compression as compression
from . import fisher as fisher
from . import linalg as linalg
from ._arguments import static_args as _static_args
from .capture import (
    CaptureReport,
    InputGram,
    KroneckerFactors,
    LayerSamples,
    StatisticsKind,
    infer_axes,
    losses,
    value_and_grad,
)
from .capture.accumulate import accumulate_statistics, all_reduce_statistics
from .linalg import jordan, polar_express, you
from .matrices.axes import MatrixAxes
from .matrices.rules import label_params
from .optimizers.dykaf import dykaf, scale_by_dykaf
from .optimizers.ekfac import ekfac, scale_by_ekfac
from .optimizers.frog import frog, kfrog, scale_by_frog, scale_by_kfrog
from .optimizers.kfac import kfac, scale_by_kfac
from .optimizers.kfac_soap import kfac_soap, scale_by_kfac_soap
from .optimizers.kl import kl_shampoo, kl_soap, scale_by_kl_shampoo, scale_by_kl_soap
from .optimizers.muon import muon, scale_by_muon
from .optimizers.newton_muon import newton_muon, scale_by_newton_muon
from .optimizers.shampoo import scale_by_shampoo, shampoo
from .optimizers.soap import scale_by_soap, soap
from .optimizers.soap_muon import kl_soap_muon, scale_by_soap_muon, soap_muon
from .preconditioner import applications as applications
from .preconditioner import decompositions as decompositions
from .preconditioner import factors as factors
from .preconditioner.applications import in_eigenbasis
from .preconditioner.contracts import Products, Refresh, Storage
from .preconditioner.precondition import precondition
from .states.eigenbases import eigenbases
from .states.health import Health, check_state, health
from .states.report import Report, report
from .states.warm_start import from_adam
from .transforms.decay import Decay, add_cautious_decay, add_decay, add_decay_after_step
from .transforms.fallback import AxesWarning, Row
from .transforms.grafting import graft
from .transforms.groups import groups, kind
from .transforms.hyperball import hyperball, pinned_step
from .transforms.norm_control import radial_brake, relative_update, update_floor
from .transforms.normuon import scale_by_normuon

# What shapes the program and cannot be traced, for tools other than optax.inject_hyperparams: that needs no list.
_FACTORIES = (
    *(soap, scale_by_soap, muon, scale_by_muon, dykaf, scale_by_dykaf),
    *(shampoo, scale_by_shampoo),
    *(kfac, scale_by_kfac, ekfac, scale_by_ekfac, kfac_soap, scale_by_kfac_soap),
    *(frog, scale_by_frog, kfrog, scale_by_kfrog),
    *(kl_shampoo, scale_by_kl_shampoo, kl_soap, scale_by_kl_soap),
    *(soap_muon, scale_by_soap_muon, kl_soap_muon),
    *(newton_muon, scale_by_newton_muon),
)
STATIC_ARGS = {f.__name__: _static_args(f) for f in _FACTORIES}

__all__ = [
    "STATIC_ARGS",
    "AxesWarning",
    "CaptureReport",
    "Decay",
    "Health",
    "InputGram",
    "KroneckerFactors",
    "LayerSamples",
    "MatrixAxes",
    "Products",
    "Refresh",
    "Report",
    "Row",
    "StatisticsKind",
    "Storage",
    "accumulate_statistics",
    "add_cautious_decay",
    "add_decay",
    "add_decay_after_step",
    "all_reduce_statistics",
    "applications",
    "check_state",
    "compression",
    "decompositions",
    "dykaf",
    "eigenbases",
    "ekfac",
    "factors",
    "fisher",
    "frog",
    "from_adam",
    "graft",
    "groups",
    "health",
    "hyperball",
    "in_eigenbasis",
    "infer_axes",
    "jordan",
    "kfac",
    "kfac_soap",
    "kfrog",
    "kind",
    "kl_shampoo",
    "kl_soap",
    "kl_soap_muon",
    "label_params",
    "linalg",
    "losses",
    "muon",
    "newton_muon",
    "pinned_step",
    "polar_express",
    "precondition",
    "radial_brake",
    "relative_update",
    "report",
    "scale_by_dykaf",
    "scale_by_ekfac",
    "scale_by_frog",
    "scale_by_kfac",
    "scale_by_kfac_soap",
    "scale_by_kfrog",
    "scale_by_kl_shampoo",
    "scale_by_kl_soap",
    "scale_by_muon",
    "scale_by_newton_muon",
    "scale_by_normuon",
    "scale_by_shampoo",
    "scale_by_soap",
    "scale_by_soap_muon",
    "shampoo",
    "soap",
    "soap_muon",
    "update_floor",
    "value_and_grad",
    "you",
]


def __getattr__(name: str) -> _Any:
    # Flax is no dependency: it is imported when its TrainState is asked for.
    if name == "TrainState":
        try:
            from .states.train_state import TrainState
        except ImportError as error:
            raise ImportError("fo.TrainState extends Flax's: pip install 'fisher_optax[flax]'.") from error
        return TrainState
    raise AttributeError(f"module 'fisher_optax' has no attribute {name!r}")
