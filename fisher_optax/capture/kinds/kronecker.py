"""The kinds of statistics: what is summed up on the way back through a layer, and what it is made into.

With inputs a and gradients δ of the loss at the outputs, over all P positions that share the layer's weights, and N
what the loss was divided by (so that N δ is the gradient of one example's own loss):

    left = Σ a aᵀ / P,   right = N Σ δ δᵀ,   squares = N Σ (Q_Aᵀ a)² ((Q_Bᵀ δ)²)ᵀ
    left ⊗ right ≈ Σ (N δ ⊗ a)(N δ ⊗ a)ᵀ / N,  the Fisher of one example, as if positions were independent (expand)

and with ``mode="reduce"``, for losses of what a layer's positions add up to, the same of ā = mean of a over the
positions of an example and δ̂ = sum of δ over them.

Sources: Martens and Grosse 2015 (arXiv 1503.05671); convolutions: Grosse and Martens 2016 (arXiv 1602.01407); expand
  and reduce: Eschenhagen et al. 2023 (arXiv 2311.00636); squares: George et al. 2018 (arXiv 1806.03884).
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax.lax import Precision
from jax.typing import ArrayLike
from jaxtyping import Array

from ... import linalg
from ...linalg.eigenbasis import LowRank
from ...statistics import LayerFactors
from ..program.leaves import LeafPlan, in_leaf_order
from ..program.sites import Site
from . import rows
from .experts import expert_sums, total_rows
from .protocol import Bases, StatisticsKind, Sums, Tapped
from .sums import accumulator, check_counts, joined, times


@dataclasses.dataclass(frozen=True)
class KroneckerFactors(StatisticsKind):
    """Kronecker factors of each layer's Fisher (see the top of this file for the sums).

    Args:
      mode: "expand" for losses of each position, "reduce" for losses of what a layer's positions add up to.
      max_examples: at most so many positions of a layer are looked at, spread over all of them; None: all. Factors then
        are estimates, at ``max_examples / P`` of the cost.
      squares: also the squares in given bases that `fo.ekfac` needs, ``grad_fn(..., bases=...)``.
      max_dim: a longer side gets ``rank`` rows instead of a matrix: a sample of its vectors, whose second moment is the
        estimate.
      rank: how many rows.
      head_rows: the layer whose outputs are the logits of `fo.losses.softmax_cross_entropy` gets, in place of its right
        side, so many tokens' logits, labels and weights: what ``fo.kfac(head=...)`` takes. None: it is as any other.

    Raises:
      ValueError: for an unknown mode, or a number below 1.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> loss = lambda W, x, y: fo.losses.gaussian(x @ W, y)
      >>> grad_fn = fo.value_and_grad(loss, fo.KroneckerFactors(max_examples=4))
      >>> factors = grad_fn(jnp.ones((3, 2)), jnp.ones((9, 3)), jnp.ones((9, 2)))[2]
      >>> factors.left.shape, factors.right.shape, float(factors.weight)
      ((3, 3), (2, 2), 9.0)
    """

    mode: str = "expand"
    max_examples: int | None = None
    squares: bool = False
    max_dim: int = 4096
    rank: int = 256
    head_rows: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("expand", "reduce"):
            raise ValueError(f"KroneckerFactors: mode must be 'expand' or 'reduce'; got {self.mode!r}.")
        check_counts("KroneckerFactors", max_examples=self.max_examples, max_dim=self.max_dim, rank=self.rank)
        check_counts("KroneckerFactors", head_rows=self.head_rows)
        if self.squares and self.head_rows is not None:
            raise ValueError("KroneckerFactors: head_rows= is for fo.kfac; squares=True is for fo.ekfac.")

    sides = ("left", "right")

    def unavailable(self, sites: tuple[Site, ...]) -> str:
        """Why the sites of a parameter have no such statistics, or nothing."""
        if self.mode == "reduce" and sites[0].groups is not None:
            return "experts, whose rows are in no order of examples: use mode='expand'"
        long = max(s.m for s in sites) + 1 > self.max_dim or max(s.n for s in sites) > self.max_dim
        if long and sites[0].groups is not None:
            return f"experts longer than max_dim={self.max_dim}, whose rows differ in number: raise max_dim"
        if long and any(s.repeated for s in sites):
            return f"used in a loop and longer than max_dim={self.max_dim}, or in a shard_map with check_vma=False"
        if long and rows.differ_in_a_stack(sites):
            return f"matrices of one stack with different numbers of positions, longer than max_dim={self.max_dim}"
        if self.mode == "reduce" and any(s.parts > 1 for s in sites):
            return "of complex numbers, whose parts have no common mean: use mode='expand'"
        return ""

    def unavailable_for(self, plan: LeafPlan, fisher: str) -> str:
        """Why this kind of Fisher has no such statistics, or nothing."""
        if fisher != "true" or "right" not in self._row_sides(plan):
            return ""
        return f"fisher='true' is a sum over passes, and rows (max_dim={self.max_dim}) do not add up; use 'mc'"

    def slots(self, plan: LeafPlan) -> int:
        """How many sites of the parameter keep what they see apart."""
        return 1 + max(plan.turns.values()) if self._row_sides(plan) else 1

    def _row_sides(self, plan: LeafPlan) -> list[str]:
        site = plan.sites[0]
        lengths = {"left": site.m + (plan.bias is not None), "right": site.n}
        return [
            side
            for side in self._sides(plan)
            if lengths[side] > self.max_dim and (side, site.how) != ("left", "embedding")
        ]

    def _sides(self, plan: LeafPlan) -> tuple[str, ...]:
        return self.sides if plan.head is None else ("left",)

    def collect(self, plan: LeafPlan, site: Site, tapped: Tapped) -> Sums:
        """The sums over one product's positions."""
        dtype, by_rows = accumulator(plan.dtype), self._row_sides(plan)
        if site.groups is not None:
            sides = (*self._sides(plan), *(("squares",) if self.squares else ()))
            return expert_sums(plan, site, tapped, sides, tapped.bases, self.max_examples, dtype)
        X, D, weights, scale = self._rows(plan, site, tapped)
        count = X.shape[-2] if weights is None else jnp.sum(weights)
        out = {"count": jnp.asarray(count * scale, dtype)}
        D = D if weights is None else D * weights[:, None].astype(D.dtype)
        chosen = rows.picked(D.shape[-2], self.rank, tapped.devices, tapped.device)
        if site.how == "embedding":
            ones = jnp.ones(X.shape[:-1], dtype) if weights is None else weights.astype(dtype)
            out["left"] = scale * jnp.zeros(site.m, dtype).at[X[..., 0]].add(ones)
        elif "left" in by_rows:
            sample = chosen.own(rows.with_ones(plan, X[..., chosen.places, :].astype(dtype)), -2)
            sample = sample * math.sqrt(scale * chosen.share)
            out["left"] = sample if weights is None else sample * chosen.of(weights, 0)[:, None].astype(dtype)
        else:
            # The bias is the weight of an input that is always 1.
            out["left"] = (scale * rows.second_moment(X, weights, plan.bias is not None)).astype(dtype)
        if "right" not in self._sides(plan):
            return out
        if "right" in by_rows:
            out["right"] = chosen.of(D, -2).astype(dtype) * math.sqrt(scale * chosen.share)
        else:
            out["right"] = (scale * rows.second_moment(D, None)).astype(dtype)
        if self.squares:
            out["squares"] = scale * self._squares(plan, site, X, D, tapped.bases or (None, None)).astype(dtype)
        return out

    def _rows(self, plan: LeafPlan, site: Site, tapped: Tapped) -> tuple[Array, Array, Array | None, float]:
        """Inputs and gradients as rows, the rows' weights, and what a sum over them stands for."""
        batch = plan.batch_position(site)
        weights = rows.row_weights(site.positions, tapped.mask, batch)
        if site.how == "convolution":
            assert site.window is not None
            x, delta = rows.canonical(tapped.x, site.x_axes), rows.canonical(tapped.delta, site.y_axes)
            places, keep = math.prod(site.positions[1:]), len(x)
            if self.max_examples is not None:
                keep = max(1, self.max_examples // places)
            chosen = rows.spread(len(x), keep)
            if len(chosen) < len(x):
                x, delta = x[chosen], delta[chosen]
                weights = None if weights is None else weights.reshape(-1, places)[chosen].reshape(-1)
            scale = site.positions[0] / len(chosen)
            X = rows.patches(x, site.window)
            X, D = X.reshape(-1, X.shape[-1]), delta.reshape(-1, delta.shape[-1])
            positions = (len(chosen), *site.positions[1:])
        else:
            X = rows.as_rows(site, tapped.x, site.x_axes, site.m if site.how == "dense" else 1)
            D = rows.as_rows(site, tapped.delta, site.y_axes, site.n)
            positions, scale = site.positions, 1.0
        if self.mode == "reduce" and len(positions) > 1 and site.how != "embedding":
            X, D, weights = rows.reduced(X, D, weights, positions, batch)
        total = X.shape[-2]
        if self.max_examples is not None and site.how != "convolution" and total > self.max_examples:
            chosen = rows.spread(total, self.max_examples)
            X, D = X[..., chosen, :], D[..., chosen, :]
            weights, scale = None if weights is None else weights[chosen], total / len(chosen)
        return X, D, weights, scale

    def _positions(self, plan: LeafPlan, count: Array) -> Array:
        """Of one use, as examples: what a loss is taken to be divided by."""
        uses = plan.uses.clip(1)
        if plan.sites[0].groups is not None:
            count, uses = total_rows(plan.sites[0], count), uses[..., None]
        return count / uses / self._each(plan)

    def _each(self, plan: LeafPlan) -> float:
        """How many of the rows that are counted belong to one example."""
        if (self.mode, plan.sites[0].how) not in (("expand", "convolution"), ("reduce", "embedding")):
            return float(plan.sites[0].parts)
        examples = sum(site.positions[plan.batch_position(site)] if site.positions else 1 for site in plan.sites)
        return sum(math.prod(site.positions) for site in plan.sites) / max(examples, 1)

    def of_gradients(self) -> bool:
        """Whether gradients are in it, whose scale has to be known."""
        return "right" in self.sides

    def needs_bases(self) -> bool:
        """Whether `collect` is to get bases."""
        return self.squares

    def without_bases(self) -> "KroneckerFactors":
        """The same without squares."""
        return dataclasses.replace(self, squares=False)

    def head_tokens(self) -> int | None:
        """How many tokens' logits stand for a head's right side."""
        return self.head_rows

    def longest_side(self) -> float:
        """Longer ones are sampled."""
        return self.max_dim

    def _squares(self, plan: LeafPlan, site: Site, X: Array, D: Array, bases: Bases) -> Array:
        Q_A, Q_B = bases
        extra = int(plan.bias is not None)
        Q_A = Q_A if Q_A is None else rows.unsorted_side(Q_A, -2, site.inputs, extra)
        Q_B = Q_B if Q_B is None else rows.unsorted_side(Q_B, -2, site.outputs)
        D = D.astype(accumulator(D.dtype))
        D = D if Q_B is None else jnp.matmul(D, Q_B.astype(D.dtype), precision=Precision.HIGHEST)
        if site.how == "embedding":
            if Q_A is None:
                return jnp.zeros((site.m, site.n), D.dtype).at[X[..., 0]].add(jnp.square(D))
            return rows.product(jnp.square(jnp.take(Q_A, X[..., 0], axis=0)), jnp.square(D))
        X = rows.with_ones(plan, X.astype(accumulator(X.dtype)))
        X = X if Q_A is None else jnp.matmul(X, Q_A.astype(X.dtype), precision=Precision.HIGHEST)
        return rows.product(jnp.square(X), jnp.square(D))

    def finish(self, plan: LeafPlan, slots: list[Sums], normalizer: ArrayLike | None) -> LayerFactors:
        """The statistics from what the taps returned."""
        site, extra = plan.sites[0], int(plan.bias is not None)
        by_rows = self._row_sides(plan)
        raw = {k: joined([slot[k] for slot in slots], -2 if k in by_rows else None) for k in slots[0]}
        count = jnp.maximum(raw["count"], 1)
        N = self._positions(plan, raw["count"]) if normalizer is None else normalizer
        found: dict[str, Any] = {}
        for side, atoms, ends, scale in (
            ("left", site.inputs, extra, 1 / count),
            ("right", site.outputs, 0, N),
        ):
            if side not in raw:
                continue
            if side in by_rows:
                x = rows.sorted_side(times(raw[side], jnp.sqrt(scale)), -1, atoms, ends)
                found[side] = LowRank(in_leaf_order(x, plan))
            else:
                diagonal = site.how == "embedding" and side == "left"
                scaled = functools.partial(times, scale=scale)
                x = scaled(raw[side]) if diagonal else linalg.blockwise(scaled, raw[side])
                for axis in (-1,) if diagonal else (-1, -2):
                    x = rows.sorted_side(x, axis, atoms, ends)
                found[side] = in_leaf_order(x, plan)
        if "squares" in raw:
            found["squares"] = in_leaf_order(times(raw["squares"], N), plan)
        sides = found.get("left"), found.get("right"), found.get("squares")
        experts = site.groups is not None
        weight = in_leaf_order(raw["count"], plan) if experts else jnp.mean(raw["count"])
        if not self.of_gradients():
            return LayerFactors(*sides, weight)
        # A loss without anything that counts is divided by 1.
        divisor = jnp.where(jnp.any(weight > 0), jnp.mean(jnp.asarray(N, weight.dtype)), 0)
        return LayerFactors(*sides, weight, divisor=divisor)


@dataclasses.dataclass(frozen=True)
class InputGram(KroneckerFactors):
    """The second moment of each layer's inputs alone, ``left = Σ a aᵀ / P``, in arguments like `KroneckerFactors`.

    A side of any length is a matrix by default, since pruning by reconstruction needs all of it.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> grad_fn = fo.value_and_grad(lambda W, x: jnp.mean(x @ W), fo.InputGram())
      >>> gram = grad_fn(jnp.ones((3, 2)), 2 * jnp.ones((9, 3)))[2]
      >>> float(gram.left[0, 1]), gram.right
      (4.0, None)
    """

    max_dim: int = 2**31
    sides = ("left",)

    def inputs_alone(self) -> bool:
        """No gradient is asked for."""
        return True
