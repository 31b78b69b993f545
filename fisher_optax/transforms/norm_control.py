"""Steps measured against the weights: each matrix keeps its norm, or moves by a share of it.

Norms are Frobenius norms of single matrices: of each expert and each scanned layer, of each part of a fused kernel.
``u`` is a direction, as methods here give it: the step is ``W ← W - lr u``. What is no matrix is stepped as ever.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .._arguments import in_range, injectable, one_of
from ..linalg.products import unit_frobenius
from ..matrices.axes import MatrixAxes
from ..matrices.blocks import from_matrices, to_matrices
from .fallback import UNCHANGED, with_fallback
from .skip_nonfinite import Freezable, skip_nonfinite

KINDS = ("matrix",)
Matrices: TypeAlias = Float[Array, "*batch m n"]
Rule: TypeAlias = Callable[[Matrices, Matrices], Matrices]  # of directions and weights


@injectable
def relative_update(*, axes: PyTree = None) -> optax.GradientTransformationExtraArgs:
    """A step as large as the weights: ``u ← |W| u / |u|``. Comes before the learning rate, which then is the share of
    its own size by which a matrix moves.

    A matrix of zeros has no size to move by, and is stepped by u as it is.

    Args:
      axes: as in `muon`.

    Raises:
      ValueError: in `update`, without ``params``.

    Source: NVIDIA's Emerging-Optimizers, ``RelativeUpdateHook``.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_muon(), fo.relative_update(), optax.scale_by_learning_rate(1e-2))
    """

    def rule(u: Matrices, W: Matrices) -> Matrices:
        size = norm(W)
        return jnp.where(size == 0, u, size * unit_frobenius(u))

    return _stateless("relative_update", rule, axes)


@injectable
def radial_brake(
    outward: float = 0.5, inward: float = 1.0, *, axes: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    """Less of the step along the weights themselves: ``u ← u - (1 - b) (⟨u, W⟩ / |W|²) W``, where b is ``outward`` for
    a step that makes the matrix larger, and ``inward`` for one that makes it smaller. Comes before the learning rate.

    Args:
      outward: what is left of the part that points outward; the default is the record's. 1 changes nothing.
      inward: what is left of the part that points inward.
      axes: as in `muon`.

    Raises:
      ValueError: for a negative number; in `update`, without ``params``.

    Source: the optimizer track of modded-nanogpt, record 29. (NVIDIA's hook of this name scales the change of the norm,
      so that steps across the weights still make them larger.)

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_muon(), fo.radial_brake(), optax.scale_by_learning_rate(1e-2))
    """
    in_range("outward", outward, 0)
    in_range("inward", inward, 0)

    def rule(u: Matrices, W: Matrices) -> Matrices:
        along = unit_frobenius(W)
        radial = jnp.sum(u * along, axis=(-2, -1), keepdims=True)
        return u - (1 - jnp.where(radial < 0, outward, inward)) * radial * along

    return _stateless("radial_brake", rule, axes)


@injectable
def update_floor(
    share: float = 0.3825, per: str = "neuron", *, axes: PyTree = None
) -> optax.GradientTransformationExtraArgs:
    """No smaller a step than a share ρ of the weights: ``u_j ← u_j max(1, ρ |W_j| / |u_j|)`` for each output neuron j,
    or for each matrix. Comes before the learning rate. Zeros stay zero.

    Args:
      share: ρ. The default is that of the record with neurons; the one with matrices has 0.35.
      per: "neuron" or "matrix".
      axes: as in `muon`.

    Raises:
      ValueError: for a negative share or another word; in `update`, without ``params``.

    Source: the optimizer track of modded-nanogpt, records 46 (neurons) and 9 (matrices).

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = optax.chain(fo.scale_by_muon(), fo.update_floor(), optax.scale_by_learning_rate(1e-2))
    """
    in_range("share", share, 0)
    one_of("per", per, ("neuron", "matrix"))
    over = (-2,) if per == "neuron" else (-2, -1)

    def rule(u: Matrices, W: Matrices) -> Matrices:
        size = norm(u, over)
        return u * jnp.maximum(1, share * norm(W, over) / jnp.where(size == 0, jnp.inf, size))

    return _stateless("update_floor", rule, axes)


def norm(X: Matrices, axes: tuple[int, ...] = (-2, -1)) -> Float[Array, "..."]:
    """Euclidean norms over the last axes, kept as ones: of numbers whose squares may overflow.

    >>> print(norm(jnp.array([[3e30, 0.0], [0.0, 4e30]])))
    [[5.e+30]]
    """
    unit = jnp.max(jnp.abs(X), axis=axes, keepdims=True, initial=0)
    unit = jnp.where(unit == 0, 1, unit)
    return unit * jnp.sqrt(jnp.sum(jnp.square(X / unit), axis=axes, keepdims=True))


def matrices_of(x: Array, axes: MatrixAxes, whole: bool = False) -> tuple[Array, ...]:
    """A leaf's matrices, in float32 at least; all of a leaf as one where norms are of leaves."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (x.reshape(1, -1),) if whole else to_matrices(x, axes)


def leaf_of(matrices: Sequence[Array], like: Array, axes: MatrixAxes, whole: bool = False) -> Array:
    """The leaf again: the inverse of `matrices_of`."""
    return matrices[0].reshape(like.shape) if whole else from_matrices(tuple(matrices), like.shape, axes)


def each_leaf(rule: Rule, updates: PyTree, params: PyTree, axes: list[MatrixAxes]) -> PyTree:
    """The rule on every matrix of every leaf."""
    leaves, treedef = jax.tree.flatten(updates)
    out = []
    for u, W, a in zip(leaves, treedef.flatten_up_to(params), axes, strict=True):
        pairs = zip(matrices_of(u, a), matrices_of(W, a), strict=True)
        out.append(leaf_of([rule(*pair) for pair in pairs], u, a))
    return treedef.unflatten(out)


def _stateless(name: str, rule: Rule, axes: PyTree) -> optax.GradientTransformationExtraArgs:
    """The rule on every matrix, and everything else as it is."""

    def build(leaf_axes: list[MatrixAxes]) -> Freezable:
        def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, PyTree]:
            del extra
            return each_leaf(rule, updates, params, leaf_axes), state

        return with_params(name, Freezable(lambda params: optax.EmptyState(), update))

    return skip_nonfinite(
        with_fallback(name, build, optax.identity(), axes=axes, kinds=KINDS, otherwise=UNCHANGED), no_squares
    )


def no_squares(tree: PyTree) -> list[bool]:
    """For `skip_nonfinite`: of which leaves squares are taken that may overflow."""
    return [False] * len(jax.tree.leaves(tree))


def with_params(name: str, tx: Freezable) -> Freezable:
    """``tx``, or an error where it is not told the parameters."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, PyTree]:
        if params is None and jax.tree.leaves(updates):
            raise ValueError(
                f"{name} measures steps against the parameters, but update was called without them: call "
                "update(grads, state, params)."
            )
        return tx.update(updates, state, params, **extra)

    return Freezable(tx.init, update)
