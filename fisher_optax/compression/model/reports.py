"""What `prune` did to each layer."""

import math
from typing import NamedTuple

from ..._tables import table


class PrunedLayer(NamedTuple):
    """One layer in a `PruningReport`, or one part of a fused kernel."""

    name: str
    shape: tuple[int, int]  # inputs, outputs of one matrix
    size: int  # weights
    removed: int
    error: float  # ½ tr(Δᵀ H Δ): half the squared change of its outputs, a mean over its inputs; NaN without data
    relative_error: float  # ... over ½ tr(Wᵀ H W)
    dead: int | None  # inputs that are always 0; None without data
    damping: float | None  # taken, over the mean of H's diagonal; None: the method does not damp
    seconds: float
    note: str = (
        ""  # matrices that no input or gradient reached, and uses beside this layer's, of which nothing is known
    )

    @property
    def matrices(self) -> int:
        """How many there are: more than one in a stack, or of experts."""
        return self.size // math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """The share of its weights that is gone."""
        return self.removed / self.size


class LeftDense(NamedTuple):
    """A parameter, or some matrices of a stack, that `prune` has not touched. Vectors, biases, norms are not listed."""

    name: str  # the path, with the places in a stack
    shape: tuple[int, ...]  # of the parameter
    size: int  # weights that are left
    reason: str  # "embedding", "head", "left out by layers=", or why the program shows no layer there
    is_meant: bool  # left by what it is, or by layers=


class PruningReport(NamedTuple):
    """What `prune` returns besides the model; printed, a table."""

    method: str
    layers: tuple[PrunedLayer, ...]
    left: tuple[LeftDense, ...] = ()

    @property
    def sparsity(self) -> float:
        """The share of all weights of these layers that is gone."""
        return sum(layer.removed for layer in self.layers) / sum(layer.size for layer in self.layers)

    @property
    def sparsity_of_all(self) -> float:
        """The share that is gone of the weights of all matrices, those that were left dense included."""
        size = sum(layer.size for layer in self.layers) + sum(leaf.size for leaf in self.left)
        return sum(layer.removed for layer in self.layers) / size

    @property
    def error(self) -> float:
        """Summed over layers."""
        return sum(layer.error for layer in self.layers)

    @property
    def seconds(self) -> float:
        """Summed over layers, calibration included."""
        return sum(layer.seconds for layer in self.layers)

    def __str__(self) -> str:
        columns = 9 if any(layer.note for layer in self.layers) else 8
        head = ("layer", "matrix", "gone", "error", "relative", "dead", "damping", "s", "note")
        total = ("all", "", f"{self.sparsity:.2%}", _number(self.error), "", "", "", f"{self.seconds:.1f}", "")
        text = table(head[:columns], [_cells(layer)[:columns] for layer in self.layers], total[:columns])
        if not self.left:
            return text
        rows = [(x.name, "x".join(map(str, x.shape)), str(x.size), x.reason) for x in self.left]
        every = ("all matrices", "", "", f"{self.sparsity_of_all:.2%} of their weights are gone")
        return f"{text}\n\n{table(('left dense', 'shape', 'weights', 'why'), rows, every)}"


def _cells(layer: PrunedLayer) -> tuple[str, ...]:
    return (
        layer.name,
        (f"{layer.matrices} of " if layer.matrices > 1 else "") + "x".join(map(str, layer.shape)),
        f"{layer.sparsity:.2%}",
        _number(layer.error),
        _number(layer.relative_error),
        "" if layer.dead is None else str(layer.dead),
        "" if layer.damping is None else f"{layer.damping:.3g}",
        f"{layer.seconds:.2f}",
        layer.note,
    )


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.3g}"
