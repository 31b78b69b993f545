"""Steps that contain the learning rate and say what becomes of a matrix's norm: it stays, or follows to first order."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._arguments import in_range, injectable, one_of, value_at
from .._xla import select
from ..linalg.products import unit_frobenius
from ..matrices.axes import MatrixAxes, Typed
from .fallback import with_fallback
from .norm_control import KINDS, Matrices, each_leaf, leaf_of, matrices_of, no_squares, norm, with_params
from .skip_nonfinite import Freezable, counted, skip_nonfinite

PLAIN = "the plain step unless you pass one"


class HyperballState(NamedTuple):
    """State of `hyperball`: how often it was called, and the radius of each matrix; none but for "initial"."""

    count: Int[Array, ""]
    radius: PyTree


@injectable
def hyperball(
    learning_rate: optax.ScalarOrSchedule,
    radius: str | float = "initial",
    radius_over: str = "matrix",
    *,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """Every matrix stays on a sphere, and the learning rate is the tangent of the angle it turns by:

        V = W - lr R u / |u|;   W ← R V / |V|

    Comes last: it contains the learning rate and takes the place of weight decay, which would do nothing. The size of u
    does nothing either, so that scales before it are idle. Let the rate fall to 0.

    A direction or a rate of zero leaves a matrix alone, to the bit. One of zeros is stepped by ``-lr u``; its first
    size is its radius.
    Inside `jax.shard_map` a matrix is what a device holds of it.

    Args:
      learning_rate: number or schedule. From a run with decay, ``sqrt(lr · wd)`` is a start.
      radius: R: "initial" ``|W|`` at `init` (the paper's), "current" ``|W|`` at each step, which keeps no state and
        drifts by rounding, or a number for all matrices.
      radius_over: "matrix", or "leaf": one norm for all experts or scanned layers of a leaf together.
      fallback: for what is no matrix, a complete optimizer; default ``-lr u``.
      axes: as in `muon`.

    Raises:
      ValueError: for another word, or a radius that is not positive; in `update`, without ``params``.

    Source: Wen et al. 2026 (arXiv 2606.16899).

    Example (MuonH):
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_muon(), fo.hyperball(0.018))
    """
    in_range("learning_rate", learning_rate, 0)
    if isinstance(radius, str):
        one_of("radius", radius, ("initial", "current"))
    elif not (isinstance(radius, int | float) and 0 < radius < float("inf")):
        raise ValueError(f"hyperball: radius must be 'initial', 'current' or a positive number; got {radius!r}.")
    one_of("radius_over", radius_over, ("matrix", "leaf"))
    build = functools.partial(_on_spheres, learning_rate, radius, radius_over == "leaf")
    return _terminal("hyperball", build, learning_rate, fallback, axes)


def _on_spheres(
    learning_rate: optax.ScalarOrSchedule, radius: str | float, whole: bool, axes: list[MatrixAxes]
) -> Freezable:
    def radii(x: Typed, a: MatrixAxes) -> tuple[Array, ...]:
        if radius != "initial":
            return ()
        # A shape has no size yet: as of zeros, the first one counts.
        W = x if isinstance(x, Array) else jnp.zeros(x.shape, x.dtype)
        return tuple(map(norm, matrices_of(W, a, whole)))

    def init(params: PyTree) -> HyperballState:
        leaves, treedef = jax.tree.flatten(params)
        own = [radii(x, a) for x, a in zip(leaves, axes, strict=True)]
        return HyperballState(jnp.zeros([], jnp.int32), treedef.unflatten(own))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, accept: Bool[Array, ""] | None = None, **extra: PyTree
    ) -> tuple[PyTree, HyperballState]:
        del extra
        rate = value_at(learning_rate, state.count)

        def start(W: Matrices) -> Array:
            return norm(W) if isinstance(radius, str) else jnp.full_like(norm(W), radius)

        def step(u: Matrices, W: Matrices, start: Float[Array, "*batch 1 1"]) -> tuple[Matrices, Array]:
            size = norm(W)
            R = jnp.where(start == 0, size, start) if radius == "initial" else start
            V = W - rate * R * unit_frobenius(u)
            on_sphere = jnp.where(rate * norm(u) == 0, 0, R * unit_frobenius(V) - W)
            return jnp.where(size == 0, -rate * u, on_sphere), R

        leaves, treedef = jax.tree.flatten(updates)
        out, new = [], []
        weights, radii_of = treedef.flatten_up_to(params), treedef.flatten_up_to(state.radius)
        for u, X, Rs, a in zip(leaves, weights, radii_of, axes, strict=True):
            Ws = matrices_of(X, a, whole)
            starts = Rs if radius == "initial" else [start(W) for W in Ws]
            steps = [step(*x) for x in zip(matrices_of(u, a, whole), Ws, starts, strict=True)]
            out.append(leaf_of([U for U, _ in steps], u, a, whole))
            new.append(tuple(select(accept, R, old) for (_, R), old in zip(steps, Rs, strict=True)) if Rs else ())
        return treedef.unflatten(out), HyperballState(counted(accept, state.count), treedef.unflatten(new))

    return with_params("hyperball", Freezable(init, update))


class PinState(NamedTuple):
    """State of `pinned_step`: how often it was called, for schedules."""

    count: Int[Array, ""]


@injectable
def pinned_step(
    learning_rate: optax.ScalarOrSchedule,
    cautious_decay: optax.ScalarOrSchedule = 0.0,
    *,
    fallback: optax.GradientTransformation | None = None,
    axes: PyTree = None,
) -> optax.GradientTransformationExtraArgs:
    """The step, but a matrix's norm changes as it would to first order alone: what curves outward is taken back.

        r = |W| - lr ⟨u, W⟩ / |W|;   V = W - lr u;   W' = r V / |V|
        W ← W' (1 - lr wd [u W > 0])

    Comes last: it contains the learning rate. A matrix of zeros is stepped by ``-lr u``.

    Args:
      learning_rate: number or schedule.
      cautious_decay: wd, per unit of learning rate, of the weights that the step shrinks anyway; number or schedule.
        The record has 0.025.
      fallback: for what is no matrix, a complete optimizer; default ``-lr u``.
      axes: as in `muon`.

    Raises:
      ValueError: for a negative number; in `update`, without ``params``.

    Source: the optimizer track of modded-nanogpt, record 46.

    Example (the last stages of the record):
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_muon(scale="shape"), fo.radial_brake(), fo.update_floor(),
      ...                  fo.pinned_step(0.0375, cautious_decay=0.025))
    """
    in_range("learning_rate", learning_rate, 0)
    in_range("cautious_decay", cautious_decay, 0)

    build = functools.partial(_pinned, learning_rate, cautious_decay)
    return _terminal("pinned_step", build, learning_rate, fallback, axes)


def _pinned(
    learning_rate: optax.ScalarOrSchedule, cautious_decay: optax.ScalarOrSchedule, axes: list[MatrixAxes]
) -> Freezable:
    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, accept: Bool[Array, ""] | None = None, **extra: PyTree
    ) -> tuple[PyTree, PinState]:
        del extra
        rate, decay = (value_at(value, state.count) for value in (learning_rate, cautious_decay))

        def rule(u: Matrices, W: Matrices) -> Matrices:
            size, V = norm(W), W - rate * u
            r = jnp.maximum(size - rate * jnp.sum(u * unit_frobenius(W), axis=(-2, -1), keepdims=True), 0)
            pinned = jnp.where(size == 0, V, jnp.where(rate * norm(u) == 0, W, r * unit_frobenius(V)))
            return pinned * (1 - rate * decay * (jnp.sign(u) * jnp.sign(W) > 0)) - W

        return each_leaf(rule, updates, params, axes), PinState(counted(accept, state.count))

    return with_params("pinned_step", Freezable(lambda params: PinState(jnp.zeros([], jnp.int32)), update))


def _terminal(
    name: str,
    build: Callable[[list[MatrixAxes]], Freezable],
    learning_rate: optax.ScalarOrSchedule,
    fallback: optax.GradientTransformation | None,
    axes: PyTree,
) -> optax.GradientTransformationExtraArgs:
    rest = optax.scale_by_learning_rate(learning_rate) if fallback is None else fallback
    return skip_nonfinite(with_fallback(name, build, rest, axes=axes, kinds=KINDS, otherwise=PLAIN), no_squares)
