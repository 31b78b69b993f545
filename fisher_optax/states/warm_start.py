"""Continue an Adam run with a matrix method."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from .. import linalg
from ..capture.to_optimizer import layer_axes
from ..matrices.axes import arrays, path_names
from ..matrices.blocks import to_stacks
from ..matrices.layout import join
from ..preconditioner.applications.eigenbasis import AdamState
from ..preconditioner.contracts import Eigenpairs, Kronecker, MatrixState
from ..preconditioner.step import gather
from ..preconditioner.transform import PreconditionState
from ..transforms.fallback import Routed, marked
from ..transforms.momentum import MomentumState
from .health import Optimizer

MEANT_FOR = "it is for fo.soap and its relatives, fo.muon, fo.frog and chains with them"


def from_adam(tx: Optimizer, adam_state: PyTree, params: PyTree, *, b1: float = 0.9) -> PyTree:
    """A state of ``tx`` that starts from what Adam knows, instead of from nothing.

    SOAP: moments as they are, in the identity basis, in which SOAP is Adam; ``L = diag(Σ_j v_ij)`` and ``R = diag(Σ_i
      v_ij)``, the diagonals that ``G Gᵀ`` and ``Gᵀ G`` had.
    The first call then finds the first basis and carries the moments into it. KL-SOAP: the same, with the factors at
      the scale of v. DyKAF: as SOAP, whose factors are too large for it by their trace until they are forgotten.
      KFAC-SOAP: the moments, of a kernel and its bias as one matrix; its factors are of statistics, which Adam has none
      of. Muon, FROG, K-FROG: Adam's first moment as momentum.
    Fallbacks, and sizes for grafting, that hold Adam: its state.
    All else starts from nothing: counters of schedules, other fallbacks, the row moments of `fo.scale_by_normuon`,
      masks. An optimizer whose matrices keep nothing like these moments is refused rather than half started: Shampoo,
      KL-Shampoo, K-FAC, EKFAC, DyKAF with ``rank1_second_moment``, others than Adam in an eigenbasis.
    All is copied: ``adam_state`` is still there when the new state was donated.

    Args:
      tx: the transformation to start, e.g. ``fo.soap(3e-3)``.
      adam_state: the state of `optax.adam`, `optax.adamw` or any chain or wrapper with one `optax.scale_by_adam` over
        all of ``params``; not of `optax.adamax`, whose second moment is another.
      params: the parameters.
      b1: Adam's decay of the first moment, for the weight of a momentum.

    Raises:
      ValueError: where ``adam_state`` holds no or several Adam states, their moments do not fit ``params``, or ``tx``
        has no use for them, for its matrices or at all.

    Example:
      >>> import jax.numpy as jnp, optax, fisher_optax as fo
      >>> params = {"w": jnp.ones((4, 4))}
      >>> state = fo.from_adam(fo.soap(3e-3), optax.adamw(1e-3).init(params), params)
    """
    adam = _find_adam(adam_state, params)
    with marked():
        state = tx.init(params)
    used: list[PyTree] = []
    state = _filled(state, adam, b1, used, None)
    if not used:
        raise ValueError(f"from_adam: this transformation keeps nothing that Adam's moments fit; {MEANT_FOR}.")
    return state


class _Adam(NamedTuple):
    """What Adam knows: how often it was called, and its moments by path."""

    count: Array
    mu: dict[str, Array]
    nu: dict[str, Array]


def _filled(state: PyTree, adam: _Adam, b1: float, used: list[PyTree], routed: Routed | None) -> PyTree:
    """The state with all that Adam knows in its place, and no mark left; what was of use is noted."""

    def fill(node: PyTree) -> PyTree:
        if isinstance(node, Routed):
            return _filled(node.state, adam, b1, used, node)
        if isinstance(node, optax.ScaleByAdamState):
            used.append(node)
            mu, nu = (_like(old, known, routed) for old, known in ((node.mu, adam.mu), (node.nu, adam.nu)))
            return node._replace(count=jnp.array(adam.count), mu=mu, nu=nu)
        if isinstance(node, MomentumState):
            used.append(node)
            weights = 1 - b1**adam.count
            mean = {path: m / jnp.maximum(weights, 1e-30) for path, m in adam.mu.items()}
            weight = jnp.asarray(weights / (1 - b1), node.weight.dtype)
            return node._replace(weight=weight, mean=_like(node.mean, mean, routed))
        if not isinstance(node, PreconditionState):
            return node
        keys = [key for key, old in node.matrices.items() if isinstance(old, MatrixState)]
        mu, nu = (gather(_stacked(known, routed), keys) for known in (adam.mu, adam.nu))
        matrices = {
            key: _start(key, old, adam.count, mu[key], nu[key]) if isinstance(old, MatrixState) else old
            for key, old in node.matrices.items()
        }
        used.extend(old for old in node.matrices.values() if isinstance(old, MatrixState) and old.application != ())
        return node._replace(matrices=matrices)

    known_states = Routed | optax.ScaleByAdamState | MomentumState | PreconditionState
    return jax.tree.map(fill, state, is_leaf=lambda node: isinstance(node, known_states))


def _like(into: PyTree, moments: dict[str, Array], routed: Routed | None) -> PyTree:
    """The moments of what a tree holds: of parameters, by path, or of layers, in a list. Copies, so that the state can
    be donated.
    """
    if isinstance(into, list) and routed is not None:
        return [jnp.array(x, old.dtype) for x, old in zip(_joined(moments, routed), into, strict=True)]
    return jax.tree.map_with_path(lambda path, old: jnp.array(moments["/".join(path_names(path))], old.dtype), into)


def _joined(moments: dict[str, Array], routed: Routed) -> list[Array]:
    return join(list(routed.layers), [moments[path] for path in routed.paths])


def _stacked(moments: dict[str, Array], routed: Routed | None) -> dict[str, Array]:
    """The moments of the layers, in the stacks of a state."""
    if routed is None:
        return {}
    return to_stacks(_joined(moments, routed), layer_axes(list(routed.layers)), routed.block_size)


def _start(key: str, old: MatrixState, count: Array, mu: Array, nu: Array) -> MatrixState:
    """A stack of matrices after ``count`` steps of Adam."""
    if old.application == ():  # Muon's has a momentum elsewhere
        return old
    if not isinstance(old.application, AdamState | optax.ScaleByAdamState):
        raise ValueError(
            f"from_adam: this transformation keeps {type(old.application).__name__} of its {key} matrices, which "
            f"Adam's moments do not fit; {MEANT_FOR}. Start it anew, by tx.init(params)."
        )
    inner: PyTree = old.application
    # A stack shared out over devices may be longer.
    mu, nu = (jnp.pad(v, ((0, len(inner.mu) - len(v)), (0, 0), (0, 0))) for v in (mu, nu))
    moments = {"mu": mu.astype(inner.mu.dtype), "nu": nu.astype(inner.nu.dtype)}
    inner = inner._replace(count=jnp.broadcast_to(count, inner.count.shape).astype(inner.count.dtype), **moments)
    if old.factors != () and _is_mean(old.factors):
        return old._replace(application=inner)
    factors, basis = jax.vmap(_diagonal)(nu, old.factors, old.basis)
    return old._replace(application=inner, factors=factors, basis=basis)


def _is_mean(factors: Kronecker) -> bool:
    """Whether factors are divided by the sum of their weights, which Adam does not know: they start from nothing."""
    return isinstance(factors.seen, tuple) and len(factors.seen) == 2 and isinstance(factors.seen[1], Array)


def _find_adam(state: PyTree, params: PyTree) -> _Adam:
    found: list[optax.ScaleByAdamState] = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, optax.ScaleByAdamState))
        if isinstance(node, optax.ScaleByAdamState)
    ]
    if len(found) != 1:
        raise ValueError(
            f"from_adam: adam_state must hold one optax.ScaleByAdamState, found {len(found)} in "
            f"{type(state).__name__}; pass the state of optax.adamw over all parameters."
        )
    mu, nu, wanted = (_by_path(tree) for tree in (arrays(found[0].mu), arrays(found[0].nu), params))
    for path, x in wanted.items():
        have = mu[path].shape if path in mu else "nothing"
        if have != jnp.shape(x):
            raise ValueError(
                f"from_adam: Adam's moments have other names or shapes than the parameters: for {path!r} of shape "
                f"{jnp.shape(x)} there is {have}; pass the state that belongs to these parameters."
            )
    [count] = jax.tree.leaves(found[0].count)
    return _Adam(count, mu, nu)


def _by_path(tree: PyTree) -> dict[str, PyTree]:
    return {"/".join(path_names(path)): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _diagonal(v: Array, old: Kronecker, basis: PyTree) -> tuple[Kronecker, PyTree]:
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
