"""A layer's inputs and output gradients as rows: one for each position."""

import itertools
import math
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array, Bool, Float, Int, Shaped

from ... import linalg
from ...statistics import Window
from ..program.leaves import LeafPlan
from ..program.sites import Site
from ..program.views import Atom
from .sums import accumulator


def as_rows(site: Site, x: Array, axes: tuple[tuple[int, ...], ...], width: int) -> Shaped[Array, "*E P d"]:
    """An operand or result with its axes grouped as (batch, positions, the rest); no batch axis where there is none."""
    x = jnp.transpose(x, sum(axes, ()))
    batch = (math.prod(a.size for a in site.batch),) if site.batch else ()
    return x.reshape(*batch, math.prod(site.positions), width)


def canonical(x: Array, axes: tuple[tuple[int, ...], ...]) -> Array:
    """A convolution's input or result as ``(examples, *spatial, channels)``."""
    return jnp.transpose(x, sum(axes, ()))


def patches(x: Float[Array, "N *spatial C"], window: Window) -> Float[Array, "N *out D"]:
    """What each output position of a convolution sees, window first, channels last: by copies of slices, since the
    convolution that would gather them is slow on a CPU.
    """
    padded = zip(window.padding, window.lhs_dilation, strict=True)
    x = jax.lax.pad(x, jnp.zeros([], x.dtype), [(0, 0, 0), *((a, b, d - 1) for (a, b), d in padded), (0, 0, 0)])
    reach = [(k - 1) * d + 1 for k, d in zip(window.shape, window.rhs_dilation, strict=True)]
    out = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, window.strides, strict=True)]
    windows = []
    for place in itertools.product(*map(range, window.shape)):
        start = [i * d for i, d in zip(place, window.rhs_dilation, strict=True)]
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, out, window.strides, strict=True)]
        windows.append(jax.lax.slice(x, (0, *start, 0), (len(x), *stop, x.shape[-1]), (1, *window.strides, 1)))
    return jnp.stack(windows, -2).reshape(len(x), *out, -1)


def spread(total: int, count: int) -> np.ndarray:
    """``count`` of ``total`` places, one in each of as many equal stretches, in no step with any period."""
    if count >= total:
        return np.arange(total)
    shift = np.modf(np.arange(count) * (math.sqrt(5) - 1) / 2)[0]
    return np.floor((np.arange(count) + shift) * total / count).astype(np.int32)


class Picked(NamedTuple):
    """Some of the places along an axis, of all devices together."""

    places: Int[Array, " k"] | np.ndarray
    own_places: Bool[Array | np.ndarray, " k"] | None  # which are this device's; None: all
    share: float  # how many places each stands for

    def of(self, x: Array, axis: int) -> Array:
        """The entries there, 0 where they are another device's: their sum over devices has all of them."""
        axis %= x.ndim
        return self.own(x[(*[slice(None)] * axis, self.places)], axis)

    def own(self, x: Array, axis: int) -> Array:
        """Entries of these places, 0 where they are another device's."""
        return (
            x
            if self.own_places is None
            else jnp.where(self.own_places.reshape(-1, *[1] * (x.ndim - 1 - axis % x.ndim)), x, 0)
        )


def picked(total: int, count: int, devices: int = 1, device: Array | int = 0) -> Picked:
    """``count`` places, spread over ``total`` on each device."""
    places = spread(total * devices, count)
    share = total * devices / len(places)
    if devices == 1:
        return Picked(places, None, share)
    here = places - device * total
    return Picked(jnp.clip(here, 0, total - 1), (here >= 0) & (here < total), share)


def second_moment(
    X: Float[Array, "*E P d"], weights: Float[Array, " P"] | None, ones: bool = False
) -> Float[Array, "*E n n"]:
    """``Σ_i w_i x_i x_iᵀ`` with weights 0 or 1, in float32 at least; with ``ones``, each x has a 1 at its end."""
    w = jnp.ones((X.shape[-2], 1), X.dtype) if weights is None else weights[:, None].astype(X.dtype)
    X = X if weights is None else X * w
    return linalg.second_moment(X, jnp.broadcast_to(w, (*X.shape[:-1], 1)) if ones else None)


def product(X: Float[Array, "*E P d"], Y: Float[Array, "*E P k"]) -> Float[Array, "*E d k"]:
    """``Xᵀ Y`` summed over positions, in float32 at least."""
    batch, axis = tuple(range(X.ndim - 2)), X.ndim - 2
    return jax.lax.dot_general(
        X,
        Y,
        (((axis,), (axis,)), (batch, batch)),
        precision=Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(X.dtype, jnp.float32),
    )


def differ_in_a_stack(sites: tuple[Site, ...]) -> bool:
    """Whether indices take matrices from one parameter for products with different numbers of positions."""
    indexed = any(item[0] == "at" for site in sites for item in site.steps)
    return indexed and len({math.prod(site.positions) for site in sites}) > 1


def sorted_side(x: Array, axis: int, atoms: tuple[Atom, ...], extra: int = 0) -> Array:
    """``axis`` reordered from the order in which a product meets its entries to the order of the parameter's axes; the
    last ``extra`` entries stay where they are.
    """
    places = _places(atoms, extra)
    return x if places is None else jnp.take(x, places, axis=axis)


def unsorted_side(x: Array, axis: int, atoms: tuple[Atom, ...], extra: int = 0) -> Array:
    """The inverse of `sorted_side`."""
    places = _places(atoms, extra)
    return x if places is None else jnp.take(x, np.argsort(places), axis=axis)


def _places(atoms: tuple[Atom, ...], extra: int) -> np.ndarray | None:
    """Where a product meets each entry of a side in the parameter's order; None where the orders are the same."""
    order = sorted(range(len(atoms)), key=lambda i: (atoms[i].source, -atoms[i].stride))
    if order == list(range(len(atoms))):
        return None
    places = np.arange(math.prod(a.size for a in atoms)).reshape([a.size for a in atoms]).transpose(order).ravel()
    return np.concatenate([places, len(places) + np.arange(extra, dtype=int)])


def row_weights(positions: tuple[int, ...], mask: Array | None, batch: int) -> Float[Array, " P"] | None:
    """1 for the positions that ``mask`` keeps and 0 for the others; None where the mask is not of these positions.

    It is of them if they begin with its axes, merged or split, or if its one axis is theirs of number ``batch``.
    """
    if mask is None:
        return None
    if mask.shape == positions[batch : batch + 1]:
        before, after = positions[:batch], positions[batch + 1 :]
    else:
        ends = [k for k in range(len(positions) + 1) if math.prod(positions[:k]) == mask.size]
        if not ends or not _regrouped(mask.shape, positions[: ends[0]]):
            return None
        before, after = (), positions[ends[0] :]
    weights = mask.astype(jnp.float32).reshape(1, -1, 1)
    return jnp.broadcast_to(weights, (math.prod(before), mask.size, math.prod(after))).reshape(-1)


def _regrouped(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether one shape merges axes of the other."""
    ends_a, ends_b = (set(itertools.accumulate(shape, operator.mul)) | {1} for shape in (a, b))
    return ends_a <= ends_b or ends_b <= ends_a


def with_ones(plan: LeafPlan, X: Array) -> Array:
    """Inputs with the 1 that a bias is the weight of, if the parameter has one."""
    return X if plan.bias is None else jnp.concatenate([X, jnp.ones((*X.shape[:-1], 1), X.dtype)], -1)


def reduced(
    X: Array, D: Array, weights: Array | None, positions: tuple[int, ...], batch: int
) -> tuple[Array, Array, Array | None]:
    """Means of inputs and sums of gradients over the positions of each example, which axis ``batch`` of them counts."""

    def by_example(x: Array, first: int) -> Array:
        x = x.reshape(*x.shape[:first], *positions, *x.shape[first + 1 :])
        x = jnp.moveaxis(x, first + batch, first).astype(accumulator(x.dtype))
        return x.reshape(*x.shape[:first], positions[batch], -1, *x.shape[first + len(positions) :])

    X, D = by_example(X, X.ndim - 2), by_example(D, D.ndim - 2)
    if weights is None:
        return jnp.mean(X, -2), jnp.sum(D, -2), None
    w = by_example(weights, 0).astype(X.dtype)
    size = jnp.sum(w, -1)
    mean = jnp.einsum("...btd,bt->...bd", X, w, precision=Precision.HIGHEST) / jnp.maximum(size, 1)[:, None]
    return mean, jnp.sum(D * w[..., None].astype(D.dtype), -2), (size > 0).astype(jnp.float32)
