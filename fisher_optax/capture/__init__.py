"""Statistics of every layer from an unmodified model: trace its loss, find the products, tap them."""

from . import losses as losses
from .gradients import value_and_grad
from .report import CaptureReport, CaptureRow, capture_report, infer_axes
from .samples import LayerSamples
from .statistics import InputGram, KroneckerFactors

__all__ = [
    "CaptureReport",
    "CaptureRow",
    "InputGram",
    "KroneckerFactors",
    "LayerSamples",
    "capture_report",
    "infer_axes",
    "losses",
    "value_and_grad",
]
