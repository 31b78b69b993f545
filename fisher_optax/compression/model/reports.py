"""What `prune` did to each layer."""

import math
from typing import NamedTuple

from ..._tables import table


class PrunedLayer(NamedTuple):
    """One layer in a `PruningReport`."""

    name: str
    shape: tuple[int, int]  # inputs, outputs of one matrix
    size: int  # weights
    removed: int
    error: float  # ½ tr(Δᵀ H Δ): half the squared change of its outputs, a mean over its inputs; NaN without data
    relative_error: float  # ... over ½ tr(Wᵀ H W)
    dead: int | None  # inputs that are always 0; None without data
    damping: float | None  # taken, over the mean of H's diagonal; None: the method does not damp
    seconds: float

    @property
    def sparsity(self) -> float:
        """The share of its weights that is gone."""
        return self.removed / self.size


class PruningReport(NamedTuple):
    """What `prune` returns besides the model; printed, a table."""

    method: str
    layers: tuple[PrunedLayer, ...]

    @property
    def sparsity(self) -> float:
        """The share of all weights of these layers that is gone."""
        return sum(layer.removed for layer in self.layers) / sum(layer.size for layer in self.layers)

    @property
    def error(self) -> float:
        """Summed over layers."""
        return sum(layer.error for layer in self.layers)

    @property
    def seconds(self) -> float:
        """Summed over layers, calibration included."""
        return sum(layer.seconds for layer in self.layers)

    def __str__(self) -> str:
        head = ("layer", "matrix", "gone", "error", "relative", "dead", "damping", "s")
        total = ("all", "", f"{self.sparsity:.2%}", _number(self.error), "", "", "", f"{self.seconds:.1f}")
        return table(head, [_cells(layer) for layer in self.layers], total)


def _cells(layer: PrunedLayer) -> tuple[str, ...]:
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        f"{layer.sparsity:.2%}",
        _number(layer.error),
        _number(layer.relative_error),
        "" if layer.dead is None else str(layer.dead),
        "" if layer.damping is None else f"{layer.damping:.3g}",
        f"{layer.seconds:.2f}",
    )


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3g}"
