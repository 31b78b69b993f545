"""K-FAC's step for the layer that gives a softmax its logits, whose output Fisher is known in closed form.

    A ← mean of a aᵀ                           moving average, as everywhere
    B ← Σ s_t (diag(p_t) - p_t p_tᵀ)           "true": of the model's own probabilities, no labels, every word
        Σ s_t δ_t δ_tᵀ                         "empirical": of the data's labels
    U = (A + π sqrt(λ) I)⁻¹ G (B + sqrt(λ)/π I)⁻¹,   π² = (tr A / d_A) / (tr B / d_B)

B is V x V for V words and never formed: it is kept as a few tokens of a moving average, and solved by
`fo.fisher.SoftmaxHead` or `fo.fisher.EmpiricalHead`. Source for π: Martens and Grosse 2015 (arXiv 1503.05671), section
6.3.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._arguments import value_at
from .._xla import select
from ..fisher.head.empirical import EmpiricalHead
from ..fisher.head.softmax import SoftmaxHead
from ..matrices.axes import LeafAxes
from ..matrices.layout import Layer
from ..matrices.names import names_head, split_names
from ..statistics import LayerFactors, Logits
from ..transforms.skip_nonfinite import Freezable

FISHERS = ("true", "empirical")


Head = SoftmaxHead | EmpiricalHead


class HeadState(NamedTuple):
    """State of `scale_by_head` for one matrix."""

    count: Int[Array, ""]
    weight: Float[Array, ""]  # of the moving averages
    left: Float[Array, "m m"]
    right: Head  # of ``rows`` rows


class ForHeads(NamedTuple):
    """What heads get, and the word for it."""

    fisher: str
    transformation: Freezable


def for_heads(
    head: str | None,
    grafting: object,
    exponent: float,
    curvature_decay: optax.ScalarOrSchedule,
    damping: optax.ScalarOrSchedule,
    rank: int,
) -> ForHeads | None:
    """Of K-FAC's arguments; None: heads get what all layers get.

    Raises:
      ValueError: for an unknown word, and for options that do not go with a head apart.
    """
    if head is None:
        return None
    if head not in FISHERS:
        raise ValueError(f"head must be None, 'true' or 'empirical'; got {head!r}.")
    if exponent != -1 and grafting is None:
        raise ValueError(f"head={head!r} is solved with exponent -1; with exponent={exponent} pass grafting='adam'.")
    return ForHeads(head, scale_by_head(head, curvature_decay, damping, rank))


def describing(
    describe: Callable[[LeafAxes], dict[str, Any]], of_heads: ForHeads | None
) -> Callable[[LeafAxes], dict[str, Any]]:
    """What a report says of a leaf."""

    def described(leaf: LeafAxes) -> dict[str, Any]:
        row = describe(leaf)
        if of_heads is None or not is_head(leaf.path):
            return row
        return {**row, "refresh_flops": 0, "reason": f"{of_heads.fisher} Fisher of the softmax's tokens"}

    return described


def is_head(path: str) -> bool:
    """Whether a kernel's name, or its module's, is one of a head's."""
    return names_head(split_names((path,)))


def scale_by_head(fisher: str, decay: optax.ScalarOrSchedule, damping: optax.ScalarOrSchedule, rows: int) -> Freezable:
    """U for a list of matrices ``(m, V)``, with ``statistics=[LayerFactors, ...]`` whose right sides are `Logits`."""

    def init(params: PyTree) -> PyTree:
        return [_start(fisher, W.shape[0], W.shape[1], rows) for W in params]

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        accept: Bool[Array, ""] | None = None,
        statistics: Sequence[LayerFactors] | None = None,
        **extra: PyTree,
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        new = state
        if statistics is not None:
            new = [_followed(s, x, value_at(decay, s.count), rows) for s, x in zip(state, statistics, strict=True)]
        out = [_solved(G, s, value_at(damping, s.count)) for G, s in zip(updates, new, strict=True)]
        return out, select(accept, [s._replace(count=s.count + 1) for s in new], state)

    return Freezable(init, update)


def _start(fisher: str, m: int, V: int, rows: int) -> HeadState:
    total, none = jnp.zeros([]), jnp.zeros((rows, V))
    if fisher == "empirical":
        right: Head = EmpiricalHead(none, total)
    else:
        right = SoftmaxHead(jnp.zeros(V), none, jnp.zeros(rows), total, False)
    return HeadState(jnp.zeros([], jnp.int32), jnp.zeros([]), jnp.zeros((m, m)), right)


def _followed(state: HeadState, statistics: LayerFactors, decay: ArrayLike, rows: int) -> HeadState:
    β = jnp.where(state.weight > 0, decay, 0.0)
    left: Any = statistics.left
    z, y, w = cast(Logits, statistics.right)
    if isinstance(state.right, SoftmaxHead):
        new = SoftmaxHead.from_logits(z, w)
    elif y.ndim == 2:
        new = EmpiricalHead.from_gradients(jax.nn.softmax(z) - y, w)
    else:
        new = EmpiricalHead.from_logits(z, y, w)
    old = _weighing(state.right, β * state.right.total)
    right = old.merge(_weighing(new, jnp.where(new.total > 0, 1 - β, 0)), rows)
    left = β * state.left + (1 - β) * left.astype(state.left.dtype)
    return HeadState(state.count, β * state.weight + (1 - β), left, right)


def _weighing(head: Any, total: ArrayLike) -> Any:
    """The same head with another total weight."""
    total = jnp.asarray(total, head.total.dtype)
    if isinstance(head, EmpiricalHead):
        return dataclasses.replace(head, total=total)
    scale = total / jnp.where(head.total > 0, head.total, 1)
    return dataclasses.replace(head, weights=scale * head.weights, total=total)


def _solved(G: Float[Array, "m V"], state: HeadState, damping: ArrayLike) -> Float[Array, "m V"]:
    """``(A + π sqrt(λ) I)⁻¹ G (B + sqrt(λ)/π I)⁻¹``."""
    λ, X = jnp.asarray(damping, jnp.float32), G.astype(jnp.float32)
    A = state.left / jnp.where(state.weight > 0, state.weight, 1)
    mean_A, mean_B = jnp.trace(A) / len(A), _trace(state.right) / G.shape[1]
    known = (mean_A > 0) & (mean_B > 0)
    π = jnp.sqrt(jnp.where(known, mean_A, 1) / jnp.where(known, mean_B, 1))
    L = jsp.linalg.cholesky(A + π * jnp.sqrt(λ) * jnp.eye(len(A)), lower=True)
    U = state.right.solve(jsp.linalg.cho_solve((L, True), X).T, jnp.sqrt(λ) / π).T
    return U.astype(G.dtype)


def _trace(head: Any) -> Array:
    if isinstance(head, EmpiricalHead):
        return jnp.sum(jnp.square(head.rows))
    share = head.weights / jnp.where(head.total > 0, head.total, 1)
    return jnp.sum(share[:, None] * head.rows * (1 - head.rows))


def check_head(method: str, fisher: str, layer: Layer, statistics: LayerFactors, shape: tuple[int, ...]) -> None:
    """A ValueError unless the statistics are those of a head of that shape."""
    *batch, m, V = shape
    left: Any = statistics.left
    fits = isinstance(statistics.right, Logits) and statistics.right.logits.shape[-1] == V
    if batch or not fits or jnp.shape(left) != (m, m):
        have = (
            f"logits {statistics.right.logits.shape}"
            if isinstance(statistics.right, Logits)
            else type(statistics.right).__name__
        )
        raise ValueError(
            f"fo.{method}: head={fisher!r} and {layer.path!r} of shape {shape} want a {m} x {m} left side and the "
            f"logits of {V} words; got left {jnp.shape(left)} and {have}. Take the statistics by "
            "fo.KroneckerFactors(head_rows=256), with a loss by fo.losses.softmax_cross_entropy."
        )


def apart(heads: list[int], of_heads: Freezable, others: Freezable) -> Freezable:
    """One transformation on the matrices of these numbers in a list, another on the rest."""

    def parts(tree: PyTree) -> tuple[PyTree, PyTree]:
        if tree is None:
            return None, None
        return [x for i, x in enumerate(tree) if i in heads], [x for i, x in enumerate(tree) if i not in heads]

    def init(params: PyTree) -> tuple[PyTree, PyTree]:
        at_heads, rest = parts(params)
        return of_heads.init(at_heads), others.init(rest)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        statistics: Sequence[LayerFactors] | None = None,
        **extra: PyTree,
    ) -> tuple[list[Array], tuple[PyTree, PyTree]]:
        both = zip((of_heads, others), parts(updates), state, parts(params), parts(statistics), strict=True)
        results: Any = [tx.update(G, s, W, statistics=x, **extra) for tx, G, s, W, x in both]
        (at_heads, head_state), (rest, rest_state) = results
        remaining = (iter(rest), iter(at_heads))
        return [next(remaining[i in heads]) for i in range(len(updates))], (head_state, rest_state)

    return Freezable(init, update)
