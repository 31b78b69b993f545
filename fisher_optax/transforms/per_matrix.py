"""A transformation of one matrix, on every matrix of a tree: in blocks, stacks and batches, over a mesh."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Inexact, Int, PyTree

from .. import linalg
from .._xla import dynamic_indices, select, sequenced_after
from ..matrices.axes import LeafAxes, MatrixAxes
from ..matrices.blocks import by_shape, from_stacks, matrix_shapes, over_stack
from ..matrices.layout import leaf_layouts, place_moments, share_out, spread
from .skip_nonfinite import Freezable, counted


class PerMatrixState(NamedTuple):
    """State of `per_matrix`."""

    count: Int[Array, ""]  # calls so far
    matrices: dict[str, PyTree]  # of the transformation, stacked by shape, e.g. "384x1536"


def per_matrix(
    tx: optax.GradientTransformation,
    axes: list[MatrixAxes],
    *,
    block_size: int | None = None,
    max_stack: int = 256,
    mesh_axis: str | None = None,
    batched: bool = False,
) -> Freezable:
    """``tx`` of every matrix of a tree whose leaves are all matrices, with these axes.

    Stacks follow one another, so that the directions of one shape alone are in memory beside what they are made of.

    Args:
      tx: of one matrix; it sees no parameters, and whatever other arguments `update` gets.
      axes: of the leaves, in order.
      block_size: cut longer sides into blocks of at most this.
      max_stack: at most so many matrices of one shape go in one batch.
      mesh_axis: share the matrices and their state out over this axis of the mesh in scope.
      batched: whether ``tx`` takes matrices along leading axes, and needs no `jax.vmap`, which traces the choices by
        platform within it a second time.
    """

    step = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> PerMatrixState:
        leaves, treedef = jax.tree.flatten(params)
        count, states = jnp.zeros([], jnp.int32), {}
        if not leaves:  # optax.tree.map_params asks with a placeholder where the parameters would be
            return PerMatrixState(count, treedef.unflatten([]))
        for key, stack in leaf_layouts(leaves, axes, block_size).items():
            initial = tx.init(jnp.zeros(stack.shape, stack.dtype))
            state = jax.tree.map(lambda x, n=stack.count: jnp.broadcast_to(x, (n, *x.shape)), initial)
            states[key] = share_out(place_moments(state, stack.layouts), mesh_axis)
        return PerMatrixState(count, states)

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, accept: Bool[Array, ""] | None = None, **extra: PyTree
    ) -> tuple[PyTree, PerMatrixState]:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        if not leaves:
            return updates, state

        def step_one(G: Array, inner: PyTree, read: PyTree) -> tuple[Array, PyTree]:
            stepped: tuple[PyTree, PyTree] = step.update(G, inner, None, **extra)
            U, new = stepped
            return U, select(accept, new, inner)

        def of_stack(G: Array, inner: PyTree) -> tuple[Array, PyTree]:
            return over_stack(step_one, G, inner, (), max_stack=max_stack, grouped=True, batched=batched)

        directions, matrices, last = {}, {}, None
        for key, Gs in by_shape(leaves, axes, block_size).items():
            Gs = Gs if accept is None else sequenced_after(last, Gs, state.count)
            operands = (jnp.concatenate(Gs), state.matrices[key])
            last, matrices[key] = of_stack(*operands) if mesh_axis is None else spread(of_stack, mesh_axis, *operands)
            directions[key] = last
        places = dynamic_indices(max(map(len, directions.values())), state.count >= 0 if accept is None else accept)
        out = from_stacks(directions, leaves, axes, block_size, places)
        count = counted(accept, state.count)
        count = count if accept is None else sequenced_after(last, count, state.count)
        return treedef.unflatten(out), PerMatrixState(count, matrices)

    return Freezable(init, update)


def describe_matrices(leaf: LeafAxes, block_size: int | None = None) -> dict[str, Any]:
    """What a report says of a leaf: its matrices."""
    assert leaf.axes is not None
    return {"matrices": tuple(matrix_shapes(leaf.shape, leaf.axes, block_size)), "block_size": block_size}


# The polar factor of a matrix, as a step: what Muon does to one.


def polar(
    polynomial: Sequence[Sequence[float]] | None = None,
    scale: str | float = 1.0,
    *,
    method: str = "auto",
    dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """``U = scale(m, n) · polar(G)`` of matrices, by a Newton-Schulz iteration; `fo.applications.orthogonal` has the
    arguments, and what they raise.
    """
    coefficients = linalg.polar_express() if polynomial is None else linalg.as_polynomial(polynomial)
    shape_scale(scale, 1, 1)
    if method not in ("auto", "direct", "gram"):
        raise ValueError(f"method must be 'auto', 'direct' or 'gram'; got {method!r}.")

    def factor(G: Inexact[Array, "*batch m n"]) -> Array:
        return shape_scale(scale, *G.shape[-2:]) * linalg.orthogonalize(G, coefficients, method=method, dtype=dtype)

    def step(updates: PyTree, params: PyTree) -> PyTree:
        del params
        return factor(updates)

    return optax.stateless(step)


def shape_scale(scale: str | float, m: int, n: int) -> float:
    """The factor in front of the polar factor of an ``m x n`` (in x out) matrix."""
    if not isinstance(scale, str):
        return scale
    scales = {
        "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
        "shape": math.sqrt(max(1.0, n / m)),
        "unit_rms": math.sqrt(n / m),
    }
    if scale not in scales:
        raise ValueError(f"scale must be a number or one of {', '.join(map(repr, scales))}; got {scale!r}.")
    return scales[scale]
