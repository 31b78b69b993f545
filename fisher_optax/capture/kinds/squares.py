"""Squares of what each position contributes to a gradient: ``Σ_s a_s² δ_s²``, the diagonal of K-FAC's expand."""

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from ...matrices.blocks import canonical_shape, from_matrices
from ...statistics import LayerFactors
from ..program.leaves import LeafPlan, in_leaf_order
from ..program.sites import Site
from . import rows
from .experts import expert_sums
from .kronecker import KroneckerFactors
from .protocol import Sums, Tapped
from .sums import accumulator, joined


@dataclasses.dataclass(frozen=True)
class PositionSquares(KroneckerFactors):
    """``squares[i, j] = Σ_s a_si² δ_sj²`` over a layer's positions, with the bias's row last; one product a layer."""

    max_dim: int = 2**31
    sides = ()

    def collect(self, plan: LeafPlan, site: Site, tapped: Tapped) -> Sums:
        """The sums over one product's positions."""
        dtype = accumulator(plan.dtype)
        if site.groups is not None:
            sums = expert_sums(plan, site, tapped, ("squares",), None, self.max_examples, dtype)
            return {"squares": sums["squares"]}
        X, D, _, scale = self._rows(plan, site, tapped)
        return {"squares": (scale * self._squares(plan, site, X, D, (None, None))).astype(dtype)}

    def finish(self, plan: LeafPlan, slots: list[Sums], normalizer: ArrayLike | None) -> LayerFactors:
        """The statistics from what the taps returned."""
        del normalizer
        site, extra = plan.sites[0], int(plan.bias is not None)
        x = joined([slot["squares"] for slot in slots], None)
        x = rows.sorted_side(rows.sorted_side(x, -2, site.inputs, extra), -1, site.outputs)
        return LayerFactors(None, None, in_leaf_order(x, plan), jnp.ones([]))


def captured(leaf: LeafPlan, leaves: list[LeafPlan]) -> bool:
    """Whether products tell all of a parameter: it is a matrix of theirs and nothing else, or the bias of one."""
    if any(owner.bias == leaf.number and captured(owner, leaves) for owner in leaves):
        return True
    return bool(leaf.sites) and not leaf.reason


def leaf_squares(leaves: list[LeafPlan], stats: list[LayerFactors | None]) -> list[Array | None]:
    """The squares in the shapes of the parameters; None for those that products do not tell all of."""
    found: list[Array | None] = [None] * len(leaves)
    for leaf, factors in zip(leaves, stats, strict=True):
        squares = None if factors is None else factors.squares
        if squares is None or leaf.axes is None or not leaf.sites or not captured(leaf, leaves):
            continue
        *batch, m, n = canonical_shape(leaf.shape, leaf.axes)
        X = squares.reshape(*batch, -1, n)
        found[leaf.number] = from_matrices((X[..., :m, :],), leaf.shape, leaf.axes)
        if leaf.bias is not None:
            found[leaf.bias] = X[..., m, :].reshape(leaves[leaf.bias].shape)
    return found
