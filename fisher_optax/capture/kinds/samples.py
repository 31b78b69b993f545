"""Statistics that are examples themselves: a few of each layer's inputs, with the gradients at its outputs."""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from ...statistics import Samples
from ..program.leaves import LeafPlan, in_leaf_order
from ..program.sites import Site
from . import rows
from .protocol import StatisticsKind, Sums, Tapped
from .sums import accumulator, check_counts, joined, times


@dataclasses.dataclass(frozen=True)
class LayerSamples(StatisticsKind):
    """Inputs and output gradients of ``size`` examples of each layer, spread over all of them: what `fo.frog` takes.

    An example of a dense layer is a position, of a convolution a whole input. A layer used in several places gives as
    many of each. One in a loop that does not run over a stack of its weights has none, since samples do not add up; for
    the same reason there are none with ``fisher="true"``, and those of several losses are the gradients of their sum.
    An example of weight w has √w times its gradient.

    Raises:
      ValueError: for a size below 1.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> loss = lambda W, x, y: fo.losses.gaussian(x @ W, y)
      >>> grad_fn = fo.value_and_grad(loss, fo.LayerSamples(4))
      >>> samples = grad_fn(jnp.ones((3, 2)), jnp.ones((9, 3)), jnp.ones((9, 2)))[2]
      >>> samples.inputs.shape, samples.gradients.shape
      ((4, 3), (4, 2))
    """

    size: int = 64

    def __post_init__(self) -> None:
        check_counts("LayerSamples", size=self.size)

    def unavailable(self, sites: tuple[Site, ...]) -> str:
        """Why the sites of a parameter have no such statistics, or nothing."""
        if any(s.repeated for s in sites):
            return "used in a loop: samples do not add up, nor in a shard_map with check_vma=False"
        if sites[0].groups is not None:
            return "experts, whose rows differ in number: samples do not stack; use fo.KroneckerFactors"
        if sites[0].how == "embedding":
            return "an embedding: it has counts, not inputs"
        if len({s.window for s in sites}) > 1 or (sites[0].window and len({s.positions[1:] for s in sites}) > 1):
            return "convolutions of different geometry"
        if rows.differ_in_a_stack(sites):
            return "matrices of one stack with different numbers of examples: samples do not stack"
        atoms = sites[0].inputs
        turned = [a.source for a in atoms] != sorted(a.source for a in atoms if a.source is not None)
        return "a convolution kernel whose channels come before its window" if sites[0].window and turned else ""

    def unavailable_for(self, plan: LeafPlan, fisher: str) -> str:
        """Why this kind of Fisher has no such statistics, or nothing."""
        del plan
        return "fisher='true' is a sum over passes, and samples do not add up; use 'mc'" if fisher == "true" else ""

    def slots(self, plan: LeafPlan) -> int:
        """How many sites of the parameter keep what they see apart."""
        return 1 + max(plan.turns.values())

    def collect(self, plan: LeafPlan, site: Site, tapped: Tapped) -> Sums:
        """The samples of one product."""
        dtype = accumulator(plan.dtype)
        weights = rows.row_weights(site.positions, tapped.mask, plan.batch_position(site))
        places = math.prod(site.positions[1:]) if site.window else 1
        total = math.prod(site.positions) if weights is None else jnp.sum(weights)
        if site.window is None:
            X = rows.as_rows(site, tapped.x, site.x_axes, site.m)
            D = rows.as_rows(site, tapped.delta, site.y_axes, site.n)
            chosen = rows.picked(X.shape[-2], self.size, tapped.devices, tapped.device)
            X, D = chosen.of(X, -2), chosen.of(D, -2)
            counts = None if weights is None else chosen.of(weights, 0)[:, None]
        else:
            X, D = rows.canonical(tapped.x, site.x_axes), rows.canonical(tapped.delta, site.y_axes)
            chosen = rows.picked(len(X), self.size, tapped.devices, tapped.device)
            X, D = chosen.of(X, 0), chosen.of(D, 0)
            counts = None if weights is None else chosen.of(weights.reshape(site.positions), 0)[..., None]
        X, D = X.astype(dtype), D.astype(dtype)
        D = D if counts is None else D * counts.astype(dtype)
        return {"count": jnp.asarray(total / places, dtype), "inputs": X, "gradients": D}

    def finish(self, plan: LeafPlan, slots: list[Sums], normalizer: ArrayLike | None) -> Samples:
        """The statistics from what the taps returned."""
        site = plan.sites[0]
        axis = -2 - len(site.window.shape) if site.window else -2
        count = joined([slot["count"] for slot in slots], None)
        X, D = (joined([slot[k] for slot in slots], axis) for k in ("inputs", "gradients"))
        D = times(D, count / plan.uses.clip(1) / site.parts if normalizer is None else normalizer)
        if site.window is None:
            X, D = rows.sorted_side(X, -1, site.inputs), rows.sorted_side(D, -1, site.outputs)
        X, D = in_leaf_order(X, plan), in_leaf_order(D, plan)
        return Samples(X, D, jnp.mean(count), window=site.window)

    def adds_up(self) -> bool:
        """Whether the sums of several backward passes are those of all their gradients."""
        return False

    def own_scale(self, total: ArrayLike, factor: Array) -> Array:
        """What the gradients of the loss, in which its mean has this factor, are multiplied by."""
        return jnp.divide(total, jnp.sqrt(jnp.where(factor == 0, 1, factor)))

    def model_scale(self, number: ArrayLike | None) -> Array:
        """What gradients of drawn labels are multiplied by, whose outer products add up to a mean: so that those of
        ``number`` examples have it as their mean.
        """
        if number is None:
            raise ValueError(
                "LayerSamples with fisher='mc' need all of the loss to be one call of fo.losses; use "
                "fisher='empirical'."
            )
        return jnp.sqrt(jnp.asarray(number, jnp.result_type(float)))
