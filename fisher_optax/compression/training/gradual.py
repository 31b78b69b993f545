"""Gradual pruning: in small steps during training, so that what is left can make up for what goes.

Every so many steps, as long as the schedule rises, masks are chosen anew from the weights of the moment; in between
they are kept. What is gone stays gone: its score is -∞.

Sources: Zhu and Gupta 2017 (arXiv 1710.01878); with the Fisher in blocks, Kurtic et al. 2022 (arXiv 2203.07259).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from ..._arguments import in_range, injectable
from ..._xla import branch
from ...matrices.axes import shapes
from ..matrix.checking import Number
from ..matrix.masks import Sparsity
from ..matrix.obert import block_moments, obert_scores, obert_step
from ..matrix.pruned import Pruned
from .keeping import masked, masked_updates, transformation, wrapper
from .targets import Pruning, as_leaves, as_matrices, unread_warning

METHODS = ("magnitude", "obert")


class GradualState(NamedTuple):
    """State of `gradual`; the trees are like the parameters, None where nothing is pruned."""

    count: Int[Array, ""]
    share: Float[Array, ""]  # that masks were last chosen for
    masks: PyTree
    moments: PyTree  # of "obert": `block_moments` of the gradients so far; None for others
    gathered: Int[Array, ""]  # how many gradients those are
    inner: PyTree


@injectable
def gradual(
    tx: optax.GradientTransformation,
    sparsity: Sparsity | optax.Schedule,
    *,
    method: str = "magnitude",
    every: int = 100,
    prune: PyTree = None,
    axes: PyTree = None,
    scope: str = "matrix",
    block: int = 50,
    damping: Number = 1e-3,
) -> optax.GradientTransformationExtraArgs:
    """Train by ``tx`` and prune on the way: after steps ``every``, ``2 every``, ... to the share that the schedule has
    there, if it is above the last one. A gradient that is not finite skips the whole step.

    Args:
      tx: any optimizer; other arguments of ``update`` are passed on to it.
      sparsity: a schedule of shares, as `cubic_schedule`; or a share or "N:M", reached at once after ``every`` steps.
      method: "magnitude" removes the smallest |W|. "obert" scores by the blocks of the empirical Fisher of the
        gradients since the last pruning (at most ``every``, those of mini-batches as they come), and makes up for what
        goes by the others; see `obert`. Scores are those of the weights after the step.
      every: how many steps lie between two prunings. The paper's 100 to 1000 leave time to recover.
      prune, axes: as in `movement`.
      scope: what a share is of: "matrix", "output", or "global" for all leaves together.
      block, damping: as in `obert`, whose state is ``block`` times the parameters that are pruned.

    Raises:
      TypeError, ValueError: for arguments out of range; in ``init``, for leaves that cannot be pruned so, as in
        `movement`; in ``update``, without ``params``.

    Warns:
      AxesWarning: naming leaves that may be matrices and are not pruned.

    Example:
      >>> import jax, jax.numpy as jnp, optax, fisher_optax as fo
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> schedule = fo.compression.cubic_schedule(0.75, begin=0, end=6)
      >>> tx = fo.compression.gradual(optax.sgd(0.01), schedule, every=3)
      >>> state, zeros = tx.init(params), []
      >>> for _ in range(6):
      ...     updates, state = jax.jit(tx.update)(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     zeros.append(int((params["kernel"] == 0).sum()))
      >>> zeros
      [0, 0, 6, 6, 6, 6]
    """
    tx = transformation("gradual", tx)
    _check(method, every, block, damping)
    pruning = Pruning("gradual", sparsity, scope, prune, axes, method == "obert").checked()
    tell = unread_warning(pruning)

    def init(params: PyTree) -> GradualState:
        axes = pruning.axes_of(params)
        tell(params)
        masks = jax.tree.map(lambda W, A: None if A is None else jnp.ones(W.shape, bool), params, axes)
        found = None
        if method == "obert":
            plain = shapes(params)  # on no mesh
            found = jax.eval_shape(lambda x: _moments(as_matrices(x, axes), block), plain)
        moments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), found)
        count, gathered = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return GradualState(count, jnp.zeros([], jnp.float32), masks, moments, gathered, tx.init(params))

    def update(grads: PyTree, state: GradualState, params: PyTree, **extra: PyTree) -> tuple[PyTree, GradualState]:
        count, axes, grads = state.count + 1, pruning.axes_of(params), masked(grads, state.masks)
        u, inner = tx.update(grads, state.inner, params, **extra)
        statistics = state.moments, state.gathered
        if method == "obert":
            next_time = -(-count // every) * every
            add = lambda g, F, n: _with(g, F, n, block)  # noqa: E731
            is_used = pruning.share(next_time) > state.share
            statistics = branch(is_used, add, lambda _, F, n: (F, n), as_matrices(grads, axes), *statistics)
        share = pruning.share(count)

        def renew(
            u: PyTree, params: PyTree, masks: PyTree, statistics: tuple[PyTree, Array]
        ) -> tuple[PyTree, PyTree, PyTree]:
            u, masks = _renewed(pruning, u, params, masks, statistics[0], share, damping)
            return u, masks, jax.tree.map(jnp.zeros_like, statistics)

        due = (count % every == 0) & (share > state.share)
        u = masked_updates(u, params, state.masks)
        same = lambda u, _, masks, statistics: (u, masks, statistics)  # noqa: E731
        u, masks, statistics = branch(due, renew, same, u, params, state.masks, statistics)
        moments, gathered = statistics
        return u, GradualState(count, jnp.where(due, share, state.share), masks, moments, gathered, inner)

    return wrapper("gradual", init, update)


def _moments(grads: PyTree, block: int) -> PyTree:
    return jax.tree.map(lambda g: block_moments(g[None], block), grads)


def _with(grads: PyTree, moments: PyTree, n: Array, block: int) -> tuple[PyTree, Array]:
    """The mean of n gradients' moments with one more."""
    return jax.tree.map(lambda F, new: F + (new - F) / (n + 1), moments, _moments(grads, block)), n + 1


def _renewed(
    pruning: Pruning, u: PyTree, params: PyTree, masks: PyTree, moments: PyTree, share: Array, damping: Number
) -> tuple[PyTree, PyTree]:
    """The update and the masks of a step at which something is pruned."""
    axes = pruning.axes_of(params)
    W = as_matrices(jax.tree.map(lambda W, u: W.astype(jnp.promote_types(W.dtype, jnp.float32)) + u, params, u), axes)
    stays = jax.tree.map(lambda M: M > 0, as_matrices(masks, axes))

    def chosen(scores: PyTree) -> PyTree:
        # What is gone goes first, so that the others that go are new.
        M = pruning.masks(jax.tree.map(lambda s, M: jnp.where(M, s, -jnp.inf), scores, stays), share)
        return jax.tree.map(jnp.logical_and, M, stays)

    if moments is None:
        new, M = W, chosen(jax.tree.map(jnp.abs, W))
    else:
        new, M = _without(pruning, W, moments, stays, chosen, share, damping)
    M = as_leaves(M, params, axes)

    def of_leaf(u: Array, visible: Array, W: Array | None, M: Array | None) -> Array:
        if M is None or W is None:
            return u
        return jnp.where(M, u if moments is None else W - visible, -visible).astype(u.dtype)

    return jax.tree.map(of_leaf, u, params, as_leaves(new, params, axes), M), M


def _without(
    pruning: Pruning,
    W: PyTree,
    moments: PyTree,
    stays: PyTree,
    chosen: Callable[[PyTree], PyTree],
    share: Array,
    damping: Number,
) -> tuple[PyTree, PyTree]:
    """Weights and masks by "obert"; only a share of all leaves together takes the scores before, and F⁻¹ twice."""
    M: PyTree = jax.tree.map(lambda _: None, W)
    if pruning.scope == "global":
        score = lambda W, F, was: obert_scores(W, F, damping=damping, stays=was)  # noqa: E731
        M = chosen(jax.tree.map(score, W, moments, stays))

    def step(W: Array, F: Array, was: Array, M: Array | None) -> Pruned:
        choose = (lambda scores: pruning.masks(scores, share)) if M is None else lambda _: M
        return obert_step(W, F, choose, damping=damping, stays=was)

    pruned = jax.tree.map(step, W, moments, stays, M)
    return tuple(jax.tree.map(lambda _, p, i=i: p[i], W, pruned) for i in (0, 1))


def _check(method: str, every: object, block: object, damping: Number) -> None:
    if method not in METHODS:
        raise ValueError(f"gradual: method must be 'magnitude' or 'obert'; got {method!r}.")
    for name, value in {"every": every, "block": block}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"gradual: {name} must be a whole number of at least 1; got {value!r}.")
    in_range("gradual: damping", damping, 0)
