"""Statistics of every layer from an unmodified model: trace its loss, find the products, tap them."""

from . import losses as losses
from .gradients import value_and_grad
from .kinds.kronecker import InputGram, KroneckerFactors
from .kinds.protocol import StatisticsKind
from .kinds.samples import LayerSamples
from .report import CaptureReport, CaptureRow, capture_report, infer_axes

__all__ = [
    "CaptureReport",
    "CaptureRow",
    "InputGram",
    "KroneckerFactors",
    "LayerSamples",
    "StatisticsKind",
    "capture_report",
    "infer_axes",
    "losses",
    "value_and_grad",
]
