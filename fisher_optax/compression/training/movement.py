"""Movement pruning: a weight stays for where it moves, not for its size.

The model has W∘M. With g = dL/d(W∘M), at every step

    S ← S - η (g∘W + λ σ'(S))     scores; g is not masked, so that what is gone may return
    W ← tx(g∘M, W)
    M ← all but the k smallest of S  (hard),    or  σ(S) > τ  (soft)

S falls where a step along -g takes the weight towards 0. λ is the weight of a penalty Σ σ(S), of the soft form alone.

Source: Sanh et al. 2020 (arXiv 2005.07683), equations 2 to 4 and section 4.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from ..._arguments import in_range, injectable, value_at
from ..matrix.masks import Sparsity
from .keeping import masked, transformation, wrapper
from .targets import Pruning, as_leaves, as_matrices, unread_warning

KINDS = ("hard", "soft")


class MovementState(NamedTuple):
    """State of `movement`; the trees are like the parameters, None where nothing is pruned."""

    count: Int[Array, ""]
    scores: PyTree  # in float32 at least
    hidden: PyTree  # W where it is masked, 0 elsewhere
    masks: PyTree
    inner: PyTree


@injectable
def movement(
    tx: optax.GradientTransformation,
    sparsity: Sparsity | optax.Schedule | None = None,
    *,
    score_learning_rate: optax.ScalarOrSchedule,
    kind: str = "hard",
    threshold: optax.ScalarOrSchedule | None = None,
    regularization: optax.ScalarOrSchedule | None = None,
    prune: PyTree = None,
    axes: PyTree = None,
    scope: str = "matrix",
) -> optax.GradientTransformationExtraArgs:
    """Train W by ``tx`` while scores decide which weights the model has (see the top of this file).

    The parameters are W∘M, exactly 0 where a weight is gone; the rest of W is in the state, with the scores: two arrays
    and a mask for each one pruned. At first all weights are there and all scores 0. A gradient that is not finite skips
    the whole step. Once the sparsity is reached, go on with ``keep_masks(tx, movement_masks(state))``.

    Args:
      tx: any optimizer. It sees all of W, and no gradient where a weight is gone; other arguments of ``update`` are
        passed on to it.
      sparsity: of "hard": a share of weights to remove, "N:M", or a schedule of shares, as `cubic_schedule`: after
        n steps, ``sparsity(n)``. Equal scores go by index: let a schedule begin after the first steps.
      score_learning_rate: η, a number or a schedule. Scores are compared with each other, so that "hard" does not
        depend on its scale; "soft" does.
      kind: "hard" or "soft".
      threshold: τ of "soft", a number or a schedule; as σ(0) = ½, below ½ at first. The paper's rises to 0.1.
      regularization: λ of "soft", in the units of the loss, a number or a schedule.
      prune: which leaves: a tree of booleans, or a function of the parameters that gives it. None: all matrices but
        embeddings and heads, by their names.
      axes: which axes are inputs and outputs, as `fo.infer_axes` reads them off the program, or as for `fo.soap`; None:
        by the rules of `fo.label_params`, which are enough where a share of whole matrices goes.
      scope: what the share of "hard" is of: "matrix", "output", or "global" for all leaves together.

    Raises:
      TypeError, ValueError: for arguments that do not fit each other or are out of range; in ``init``, for leaves that
        cannot be pruned so, and where outputs are pruned each by itself and only the order of a leaf's axes says which
        are its inputs; in ``update``, without ``params``.

    Warns:
      AxesWarning: naming leaves that may be matrices and are not pruned.

    Example:
      >>> import jax.numpy as jnp, optax, fisher_optax as fo
      >>> params = {"kernel": jnp.array([[1.0, 1.0], [-1.0, -1.0]])}
      >>> tx = fo.compression.movement(optax.sgd(0.1), 0.5, score_learning_rate=1.0)
      >>> g = {"kernel": jnp.array([[1.0, -1.0], [1.0, -1.0]])}  # the second and third move away from 0
      >>> updates, state = tx.update(g, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"].round(1))
      [[ 0.   1.1]
       [-1.1  0. ]]
    """
    tx = transformation("movement", tx)
    _check(kind, sparsity, threshold, regularization, score_learning_rate)
    pruning = Pruning("movement", 0.0 if sparsity is None else sparsity, scope, prune, axes).checked()
    tell = unread_warning(pruning)

    def init(params: PyTree) -> MovementState:
        targets = pruning.axes_of(params)
        tell(params)

        def each(make: Callable[[Array | jax.ShapeDtypeStruct], Array]) -> PyTree:
            return jax.tree.map(lambda W, A: None if A is None else make(W), params, targets)

        return MovementState(
            jnp.zeros([], jnp.int32),
            each(lambda W: jnp.zeros(W.shape, jnp.promote_types(W.dtype, jnp.float32))),
            each(lambda W: jnp.zeros(W.shape, W.dtype)),
            each(lambda W: jnp.ones(W.shape, bool)),
            tx.init(params),
        )

    def update(grads: PyTree, state: MovementState, params: PyTree, **extra: PyTree) -> tuple[PyTree, MovementState]:
        count = state.count + 1
        W = jax.tree.map(_whole, params, state.masks, state.hidden)
        u, inner = tx.update(masked(grads, state.masks), state.inner, W, **extra)
        η, λ = (
            value_at(score_learning_rate, state.count),
            0 if kind == "hard" else value_at(regularization, state.count),
        )

        def scored(S: Array, g: Array, W: Array) -> Array:
            σ = jax.nn.sigmoid(S)
            return (S - η * (g.astype(S.dtype) * W.astype(S.dtype) + λ * σ * (1 - σ))).astype(S.dtype)

        S = jax.tree.map(lambda g, W, S: None if S is None else scored(S, g, W), grads, W, state.scores)
        if kind == "hard":
            M = _hard(pruning, S, params, count)
        else:
            M = jax.tree.map(lambda s: jax.nn.sigmoid(s) > value_at(threshold, count), S)
        updates = jax.tree.map(_to_visible, u, params, W, state.masks, M)
        hidden = jax.tree.map(_hidden, u, W, M)
        return updates, MovementState(count, S, hidden, M, inner)

    return wrapper("movement", init, update)


def movement_masks(state: PyTree) -> PyTree:
    """The masks of `movement`, out of an optimizer's state however deep: a tree like the parameters, True for what
    stays, None where nothing is pruned.

    Raises:
      ValueError: where the state has none, or more than one.

    Example:
      >>> import jax.numpy as jnp, optax, fisher_optax as fo
      >>> tx = optax.chain(fo.compression.movement(optax.sgd(0.1), 0.5, score_learning_rate=1.0))
      >>> print(fo.compression.movement_masks(tx.init({"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)})))
      {'bias': None, 'kernel': Array([[ True,  True]], dtype=bool)}
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_movement) if _is_movement(x)]
    if len(found) != 1:
        raise ValueError(
            f"movement_masks: {len(found)} states of movement in {type(state).__name__}; pass the optimizer's state, "
            "or the one part of it that is meant."
        )
    return found[0].masks


def _is_movement(node: object) -> bool:
    return isinstance(node, MovementState)


def _whole(W: Array, M: Array | None, hidden: Array | None) -> Array:
    return W if M is None or hidden is None else jnp.where(M, W, hidden)


def _hidden(u: Array, W: Array, M: Array | None) -> Array | None:
    return None if M is None else jnp.where(M, 0, W + u).astype(W.dtype)


def _to_visible(u: Array, visible: Array, W: Array, before: Array | None, M: Array | None) -> Array:
    """From W∘M to (W + u)∘M'; for what stays u itself, which the difference would round."""
    if M is None or before is None:
        return u
    return jnp.where(M, jnp.where(before, u, W + u - visible), -visible)


def _hard(pruning: Pruning, scores: PyTree, params: PyTree, count: Array) -> PyTree:
    axes = pruning.axes_of(params)
    return as_leaves(pruning.masks(as_matrices(scores, axes), pruning.share(count)), params, axes)


def _check(
    kind: str,
    sparsity: object,
    threshold: optax.ScalarOrSchedule | None,
    regularization: optax.ScalarOrSchedule | None,
    score_learning_rate: optax.ScalarOrSchedule,
) -> None:
    if kind not in KINDS:
        raise ValueError(f"movement: kind must be 'hard' or 'soft'; got {kind!r}.")
    soft = {"threshold": threshold, "regularization": regularization}
    wanted, other = ({"sparsity": sparsity}, soft) if kind == "hard" else (soft, {"sparsity": sparsity})
    missing = [name for name, value in wanted.items() if value is None]
    unfit = [name for name, value in other.items() if value is not None]
    if missing or unfit:
        raise ValueError(
            f"movement: kind {kind!r} takes {' and '.join(wanted)}, not {' or '.join(other)}; "
            + (f"without {missing[0]}." if missing else f"got {unfit[0]}.")
        )
    in_range("movement: score_learning_rate", score_learning_rate, 0)
    for name, value, high in (("threshold", threshold, 1.0), ("regularization", regularization, float("inf"))):
        if value is not None:
            in_range(f"movement: {name}", value, 0, high)
