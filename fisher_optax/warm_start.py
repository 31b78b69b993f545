"""Continue an Adam run with a matrix method."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from . import linalg
from .applications.eigenbasis import AdamState
from .axes import resolve_axes
from .matrices import to_matrices
from .momentum import MomentumState
from .precondition import PreconditionState
from .reporting import Row, report
from .types import Kronecker


def from_adam(tx: optax.GradientTransformation, adam_state: Any, params: Any, *, b1: float = 0.9) -> Any:
    """A state of ``tx`` that starts from what Adam knows, instead of from nothing.

    SOAP: moments as they are, in the identity basis, in which SOAP is Adam; ``L = diag(Σ_j v_ij)`` and ``R = diag(Σ_i v_ij)``, the diagonals that ``G Gᵀ`` and ``Gᵀ G`` had.
    The first call then finds the first basis and carries the moments into it. Muon: Adam's first moment as momentum. Fallbacks that hold Adam: its state.
    Counters of schedules start at 0.

    Args:
      tx: the transformation to start, e.g. ``fo.soap(3e-3)``.
      adam_state: the state of `optax.adam`, `optax.adamw` or any chain with one `optax.scale_by_adam` over all of ``params``.
      params: the parameters.
      b1: Adam's decay of the first moment, for the weight of a momentum.

    Raises:
      ValueError: where ``adam_state`` holds no or several Adam states, their moments do not fit ``params``, or ``tx`` has no use for them.

    Example:
      >>> import jax.numpy as jnp, optax, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 4))}
      >>> state = fo.from_adam(fo.soap(3e-3), optax.adamw(1e-3).init(params), params)
    """
    adam = _find_adam(adam_state, params)
    rows = {row.path: row for row in report(tx, params).rows if row.axes is not None}
    leaves = [rows.get(leaf.path) for leaf in resolve_axes(params)]
    treedef = jax.tree.structure(params)
    found = []

    def each(moments: Any, into: Any, convert: Any) -> Any:
        """``convert(row, moment, entry)`` for every leaf that the state ``into`` has."""
        entries = zip(leaves, jax.tree.leaves(moments), treedef.flatten_up_to(into), strict=True)
        return treedef.unflatten([e if isinstance(e, optax.MaskedNode) else convert(row, x, e) for row, x, e in entries])

    def fill(node: Any) -> Any:
        found.append(node)
        if isinstance(node, optax.ScaleByAdamState):
            return node._replace(count=adam.count, mu=each(adam.mu, node.mu, _cast), nu=each(adam.nu, node.nu, _cast))
        if isinstance(node, MomentumState):
            unbias = 1 - b1**adam.count
            mean = each(adam.mu, node.mean, lambda row, x, old: (x / jnp.maximum(unbias, 1e-30)).astype(old.dtype))
            return node._replace(weight=jnp.asarray(unbias / (1 - b1), node.weight.dtype), mean=mean)
        if isinstance(node, PreconditionState) and isinstance(node.application, AdamState):
            old = node.application
            inner = old._replace(count=adam.count, mu=each(adam.mu, old.mu, _matrices), nu=each(adam.nu, old.nu, _matrices))
            return node._replace(application=inner, factors=each(adam.nu, node.factors, _diagonals))
        found.pop()
        return node

    state = jax.tree.map(fill, tx.init(params), is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState | MomentumState | PreconditionState))
    if not found:
        raise ValueError("from_adam: this transformation keeps nothing that Adam's moments fit; it is for fo.soap, fo.muon and chains with them.")
    return state


def _find_adam(state: Any, params: Any) -> optax.ScaleByAdamState:
    adams = [node for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, optax.ScaleByAdamState)) if isinstance(node, optax.ScaleByAdamState)]
    if len(adams) != 1:
        raise ValueError(f"from_adam: adam_state must hold one optax.ScaleByAdamState, found {len(adams)} in {type(state).__name__}; pass the state of optax.adamw over all parameters.")
    shapes, wanted = ([x.shape for x in jax.tree.leaves(tree)] for tree in (adams[0].mu, params))
    if shapes != wanted:
        raise ValueError(f"from_adam: Adam's moments have shapes {shapes}, the parameters {wanted}; pass the state that belongs to these parameters.")
    return adams[0]


def _cast(row: Row | None, x: Array, old: Array) -> Array:
    return x.astype(old.dtype)


def _matrices(row: Row | None, x: Array, old: tuple[Array, ...]) -> tuple[Array, ...]:
    assert row is not None and row.axes is not None
    return tuple(piece.astype(o.dtype) for piece, o in zip(to_matrices(x, row.axes, row.block_size), old, strict=True))


def _diagonals(row: Row | None, nu: Array, old: tuple[Kronecker, ...]) -> tuple[Kronecker, ...]:
    """The factors whose diagonals are the row and column sums of Adam's second moment."""
    assert row is not None and row.axes is not None
    return tuple(_diagonal(v, o) for v, o in zip(to_matrices(nu, row.axes, row.block_size), old, strict=True))


def _diagonal(v: Array, old: Kronecker) -> Kronecker:
    sides = []
    for A, axis in zip(old, (-1, -2), strict=True):
        d = jnp.sum(v, axis)
        full = d[..., :, None] * jnp.eye(d.shape[-1], dtype=v.dtype)
        packed = A is not None and A.shape != full.shape
        sides.append(None if A is None else (linalg.pack(full) if packed else full).astype(A.dtype))
    return Kronecker(*sides)
