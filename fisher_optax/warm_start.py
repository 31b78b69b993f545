"""Continue an Adam run with a matrix method."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from . import linalg
from .applications.eigenbasis import AdamState
from .axes import resolve_axes
from .matrices import to_stacks
from .momentum import MomentumState
from .reporting import report
from .seam import MatrixState, PreconditionState
from .trees import arrays
from .types import Eigenpairs, Kronecker


def from_adam(tx: Any, adam_state: Any, params: Any, *, b1: float = 0.9) -> Any:
    """A state of ``tx`` that starts from what Adam knows, instead of from nothing.

    SOAP: moments as they are, in the identity basis, in which SOAP is Adam; ``L = diag(Σ_j v_ij)`` and ``R = diag(Σ_i
      v_ij)``, the diagonals that ``G Gᵀ`` and ``Gᵀ G`` had.
    The first call then finds the first basis and carries the moments into it. KL-SOAP: the same, with the factors at
      the scale of v. DyKAF: as SOAP, whose factors are too large for it by their trace until they are forgotten. Muon:
      Adam's first moment as momentum.
    Fallbacks that hold Adam: its state.
    Counters of schedules start at 0. All is copied: ``adam_state`` is still there when the new state was donated.

    Args:
      tx: the transformation to start, e.g. ``fo.soap(3e-3)``.
      adam_state: the state of `optax.adam`, `optax.adamw` or any chain with one `optax.scale_by_adam` over all of
        ``params``.
      params: the parameters.
      b1: Adam's decay of the first moment, for the weight of a momentum.

    Raises:
      ValueError: where ``adam_state`` holds no or several Adam states, their moments do not fit ``params``, or ``tx``
        has no use for them.

    Example:
      >>> import jax.numpy as jnp, optax, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 4))}
      >>> state = fo.from_adam(fo.soap(3e-3), optax.adamw(1e-3).init(params), params)
    """
    adam: Any = arrays(_find_adam(adam_state, params))
    rows = {row.path: row for row in report(tx, params).rows if row.axes is not None}
    leaves = [rows.get(leaf.path) for leaf in resolve_axes(params)]
    treedef = jax.tree.structure(params)
    used = []

    def leafwise(moments: Any, into: Any) -> Any:
        pairs = zip(jax.tree.leaves(moments), treedef.flatten_up_to(into), strict=True)
        return treedef.unflatten(
            [old if isinstance(old, optax.MaskedNode) else jnp.array(x, old.dtype) for x, old in pairs]
        )

    def stacked(moments: Any) -> dict[str, Array]:
        mine = [(x, row) for x, row in zip(jax.tree.leaves(moments), leaves, strict=True) if row is not None]
        return to_stacks(
            [x for x, _ in mine],
            [row.axes for _, row in mine if row.axes is not None],
            mine[0][1].block_size if mine else None,
        )

    def fill(node: Any) -> Any:
        if isinstance(node, optax.ScaleByAdamState):
            used.append(node)
            return node._replace(
                count=jnp.array(adam.count), mu=leafwise(adam.mu, node.mu), nu=leafwise(adam.nu, node.nu)
            )
        if isinstance(node, MomentumState):
            used.append(node)
            weights = 1 - b1**adam.count
            mean = jax.tree.map(lambda m: m / jnp.maximum(weights, 1e-30), adam.mu)
            weight = jnp.asarray(weights / (1 - b1), node.weight.dtype)
            return node._replace(weight=weight, mean=leafwise(mean, node.mean))
        if not isinstance(node, PreconditionState) or not isinstance(node.matrices, dict):
            return node
        fitting = {key: old for key, old in node.matrices.items() if isinstance(old.application, AdamState)}
        if not fitting:
            return node
        mu, nu = stacked(adam.mu), stacked(adam.nu)
        used.extend(fitting)
        known = {key: _start(old, adam.count, mu[key], nu[key]) for key, old in fitting.items()}
        return node._replace(matrices=node.matrices | known)

    held = optax.ScaleByAdamState | MomentumState | PreconditionState
    state = jax.tree.map(fill, tx.init(params), is_leaf=lambda node: isinstance(node, held))
    if not used:
        raise ValueError(
            "from_adam: this transformation keeps nothing that Adam's moments fit; it is for fo.soap and its "
            "relatives, fo.muon and chains with them."
        )
    return state


def _start(old: MatrixState, count: Array, mu: Array, nu: Array) -> MatrixState:
    """A stack of matrices after ``count`` steps of Adam."""
    inner = old.application
    # A stack shared out over devices may be longer.
    mu, nu = (jnp.pad(v, ((0, len(inner.mu) - len(v)), (0, 0), (0, 0))) for v in (mu, nu))
    moments = {"mu": mu.astype(inner.mu.dtype), "nu": nu.astype(inner.nu.dtype)}
    inner = inner._replace(count=jnp.broadcast_to(count, inner.count.shape).astype(inner.count.dtype), **moments)
    factors, basis = jax.vmap(_diagonal)(nu, old.factors, old.basis)
    return old._replace(application=inner, factors=factors, basis=basis)


def _find_adam(state: Any, params: Any) -> optax.ScaleByAdamState:
    adams = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, optax.ScaleByAdamState))
        if isinstance(node, optax.ScaleByAdamState)
    ]
    if len(adams) != 1:
        raise ValueError(
            f"from_adam: adam_state must hold one optax.ScaleByAdamState, found {len(adams)} in "
            f"{type(state).__name__}; pass the state of optax.adamw over all parameters."
        )
    shapes, wanted = ([jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (adams[0].mu, params))
    if shapes != wanted:
        raise ValueError(
            f"from_adam: Adam's moments have shapes {shapes}, the parameters {wanted}; pass the state that belongs "
            "to these parameters."
        )
    return adams[0]


def _diagonal(v: Array, old: Kronecker, basis: Any) -> tuple[Kronecker, Any]:
    """The factors whose diagonals are the row and column sums of Adam's second moment, kept as the old ones are, and
    the basis; with eigenvalues, the factors are divided so that their product has the scale of v.
    """
    rows, columns = v.sum(1), v.sum(0)
    if isinstance(basis, Eigenpairs):
        total = jnp.sqrt(jnp.sum(v))
        rows, columns = (jnp.where(total > 0, d / jnp.where(total > 0, total, 1), 1) for d in (rows, columns))
        left, right = (
            None if old is None else d.astype(old.dtype) for d, old in zip((rows, columns), basis[2:], strict=True)
        )
        basis = basis._replace(left_values=left, right_values=right)

    def side(A: Array | None, d: Array) -> Array | None:
        if A is None:
            return None
        full = jnp.diag(d)
        return (full if A.shape == full.shape else linalg.pack(full)).astype(A.dtype)

    return old._replace(left=side(old.left, rows), right=side(old.right, columns)), basis
