"""What each parameter of a program gets, and why not more."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ...matrices.axes import MatrixAxes
from .sites import NOT_EXPERTS, Site, sources
from .views import Step
from .walk import Uses


class LeafPlan(NamedTuple):
    """One parameter: the products whose statistics it gets, as matrices with these axes."""

    number: int
    path: str
    shape: tuple[int, ...]
    dtype: Any  # a key's too
    sites: tuple[Site, ...]
    axes: MatrixAxes | None
    bias: int | None  # the parameter that is added to its outputs
    use: str  # "dense", "convolution", "embedding", "bias of ...", or what else is done with it
    reason: str  # why it does not get more
    batch_axis: int = 0  # which axis of a layer's positions counts examples
    head: int | None = None  # the loss whose logits it gives

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """In the order in which loops, indices and products take the axes."""
        return tuple(self.shape[a] for a in self.sites[0].batch_axes)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Of those axes that loops and indices take."""
        return self.batch_shape[: len(self.sites[0].steps)]

    @property
    def turns(self) -> dict[int, int]:
        """By number of the site: how often its matrix was used before."""
        uses, turns = np.zeros(self.stack_shape, int), {}
        for site in self.sites:
            turns[site.number] = int(uses[_place(site)].max())
            uses[_place(site)] += 1
        return turns

    @property
    def uses(self) -> np.ndarray:
        """How many products there are with each matrix that loops and indices take."""
        uses = np.zeros(self.stack_shape, int)
        for site in self.sites:
            uses[_place(site)] += 1
        return uses

    def batch_position(self, site: Site) -> int:
        """Which of a product's positions counts examples; of a convolution, and where there are fewer, the first."""
        return self.batch_axis if site.window is None and self.batch_axis < len(site.positions) else 0


def _place(site: Site) -> tuple[int | slice, ...]:
    return tuple(item[2] if item[0] == "at" else slice(None) for item in site.steps)


def leaf_plans(
    uses: Uses,
    paths: Sequence[str],
    dtypes: Sequence[Any],
    unavailable: Callable[[tuple[Site, ...]], str],
) -> list[LeafPlan]:
    """A plan for every parameter; ``unavailable(sites)`` says why these sites cannot be captured, or nothing."""
    plans = [_leaf(i, path, dtypes[i], uses, unavailable) for i, path in enumerate(paths)]
    for b, plan in enumerate(plans):
        owner = None if plan.sites else _owner(b, uses, plans)
        if owner is not None:
            plans[owner.number] = owner._replace(bias=b, axes=_with_bias(owner.axes, plan.path))
            plans[b] = plan._replace(use=f"bias of {owner.path}", reason="")
        elif uses.biases[b]:
            plans[b] = plan._replace(use="bias", reason="not that of one captured kernel alone")
    return plans


def _leaf(i: int, path: str, dtype: Any, uses: Uses, unavailable: Callable[[tuple[Site, ...]], str]) -> LeafPlan:
    shape, sites, others = uses.shapes[i], tuple(uses.sites[i]), uses.others[i]
    plan = LeafPlan(i, path, shape, dtype, (), None, None, ", ".join(others) or "nothing", "")
    if not sites:
        missing = NOT_EXPERTS if "ragged_dot_general" in others else "no product with it was found"
        return plan._replace(reason="" if len(shape) < 2 else missing)
    first = next((s for s in sites if s.how != "embedding"), sites[0])
    alike = tuple(site for site in sites if _roles(site) == _roles(first))
    notes = [] if len(alike) == len(sites) else ["also used the other way round, which is left out"]
    notes += [f"also used by {', '.join(others)}"] if others else []
    notes += ["of complex numbers, whose parts count as positions"] if any(s.parts > 1 for s in alike) else []
    plan = plan._replace(use=first.how, reason="; ".join(notes))
    if not jnp.issubdtype(dtype, jnp.floating):
        return plan._replace(reason=f"{jnp.dtype(dtype)} is no real floating point")
    if any(jnp.issubdtype(aval.dtype, jnp.complexfloating) for site in alike for aval in site.avals):
        return plan._replace(reason=f"a {first.how} of complex numbers")
    if why := unavailable(alike):
        return plan._replace(reason=why)
    inputs, outputs, batch = _roles(first)
    axes = MatrixAxes(inputs, outputs, tuple(sorted(batch)))
    head = uses.heads.get(alike[0].number) if len(alike) == 1 else None
    return plan._replace(sites=alike, axes=axes, head=head)


def _roles(site: Site) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return tuple(sorted(sources(site.inputs))), tuple(sorted(sources(site.outputs))), tuple(site.batch_axes)


def _owner(b: int, uses: Uses, plans: list[LeafPlan]) -> LeafPlan | None:
    """The plan of the kernel whose outputs, and nothing else, parameter ``b`` is added to, each time."""
    added = {site.number: (site, steps) for site, steps in uses.biases[b]}
    if not added or uses.others[b] or len(added) != len(uses.biases[b]):
        return None
    owner = plans[next(iter(added.values()))[0].leaf]
    if owner.axes is None or owner.bias is not None or {site.number for site in owner.sites} != set(added):
        return None
    if any(site.parts > 1 for site in owner.sites):  # a real bias is added to the real part alone
        return None
    fits = uses.shapes[b] == tuple(owner.shape[a] for a in owner.axes.batch + owner.axes.outputs)
    # In front of the outputs, in the kernel's order: its shape does not tell where two of these axes are equally long.
    front = {axis: i for i, axis in enumerate(sorted(owner.axes.batch))}
    alike = all(
        _without_axes(site.steps) == _without_axes(steps)
        and [front[of_site[1]] for of_site in site.steps] == [of_bias[1] for of_bias in steps]
        for site, steps in added.values()
    )
    return owner if fits and alike else None


def _without_axes(steps: Sequence[Step]) -> list[tuple[str | int, ...]]:
    return [(item[0], *item[2:]) for item in steps]


def _with_bias(axes: MatrixAxes | None, path: str) -> MatrixAxes | None:
    return None if axes is None else MatrixAxes(axes.inputs, axes.outputs, axes.batch, bias=path)


def in_leaf_order(x: Array, plan: LeafPlan) -> Array:
    """An array that begins with the plan's batch axes, merged as products took them, with these in the leaf's order."""
    axes = plan.sites[0].batch_axes
    x = x.reshape(*plan.batch_shape, *x.shape[_merged_rank(plan) :])
    return jnp.moveaxis(x, range(len(axes)), [sorted(axes).index(a) for a in axes])


def matrix_counts(plan: LeafPlan, counts: Array) -> Array:
    """Counts of a stack's matrices, or of each that a product takes at once, for all matrices in the leaf's order."""
    merged = plan.batch_shape[len(plan.stack_shape) :]
    own = counts.ndim == len(plan.stack_shape)
    counts = jnp.broadcast_to(counts[..., None], (*counts.shape, math.prod(merged))) if own and merged else counts
    return in_leaf_order(counts, plan).reshape(-1)


def in_product_order(x: Array, plan: LeafPlan) -> Array:
    """The inverse of `in_leaf_order`."""
    axes = plan.sites[0].batch_axes
    x = jnp.moveaxis(x, [sorted(axes).index(a) for a in axes], range(len(axes)))
    merged = plan.batch_shape[len(plan.stack_shape) :]
    return x.reshape(*plan.stack_shape, *((math.prod(merged),) if merged else ()), *x.shape[len(axes) :])


def _merged_rank(plan: LeafPlan) -> int:
    return len(plan.stack_shape) + (len(plan.batch_shape) > len(plan.stack_shape))
