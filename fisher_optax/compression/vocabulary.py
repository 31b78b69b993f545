"""Fewer tokens: rows of embedding and head that go, and what the loss makes of it.

Without the tokens R the model's distribution is ``p_v / (1 - p_R)`` on the others, p_R the sum of p over R. On texts in
which no token of R occurs, neither read nor to be predicted, each position's loss so changes by ``log(1 - p_R)``,
exactly. A removed row is cut off or its logit put to -∞; a row of zeros would have logit 0, more than many others.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import KeyPath
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from ..capture.losses import example_weights, total
from ..fisher import DiagonalFisher
from ..matrices.axes import path_names
from .matrix.checking import require_finite
from .token_axes import of_names, of_program, of_user

Ids: TypeAlias = ArrayLike | Sequence[object]  # an array, or numbers in sequences


class Trimmed(NamedTuple):
    """What `remove_tokens` returns; all arrays, to be saved together."""

    params: PyTree
    id_map: Int[Array, " old"]  # from old ids to new ones; -1 for a removed token
    kept: Int[Array, " new"]  # from new ids to old ones

    def encode(self, tokens: Ids) -> Int[Array, "..."]:
        """Old ids as new ones. Under `jit` what has none becomes -1.

        Raises:
          ValueError: for ids that were removed, by name, or never were.
        """
        tokens = jnp.asarray(tokens)
        new = jnp.where(tokens < 0, -1, self.id_map.at[tokens].get(mode="fill", fill_value=-1))
        if not isinstance(new, Tracer) and (lost := np.unique(np.asarray(tokens)[np.asarray(new) < 0])).size:
            raise ValueError(
                f"encode: {_some(lost)} occur, which have no new id: removed, or outside of 0 to "
                f"{len(self.id_map) - 1}. Replace or skip such texts."
            )
        return new


def remove_tokens(
    params: PyTree,
    ids: Ids,
    *,
    vocabulary: int | None = None,
    leaves: Mapping[str, int] | None = None,
    apply_fn: Callable[..., PyTree] | None = None,
    batch: PyTree = None,
) -> Trimmed:
    """The model without some tokens: every leaf with a vocabulary axis, sliced once.

    With ``apply_fn`` these are what its program looks the batch up in, and what it returns the product of (with its
    bias), tied or not, whatever their names and layouts. Without it they are found by the rules of `fo.label_params`:
    an embedding, a head (``head``, ``lm_head``, ``logits``) and the head's bias, with an axis of the vocabulary's
    length. There, any other leaf with such an axis, a second embedding, two axes of that length in one leaf, or a head
    whose layout only its shape tells could mean another thing, and is an error that asks for the program or ``leaves``.
    So is an embedding of another length than the head, as where one of them is padded.

    Args:
      params: of the model, untouched. New ids count the kept tokens in their old order.
      ids: of the tokens that go, as concrete integers; one named twice goes once, and none is fine.
      vocabulary: its length V. None: the one that embedding and head have in common, or that of the only one of them.
      leaves: path -> vocabulary axis of all that are to be sliced, as ``{"wte": 0, "out/kernel": -1}``.
      apply_fn, batch: as for `prune`, ``apply_fn(params, batch)`` -> logits; arrays, or `jax.ShapeDtypeStruct`.

    Returns:
      A `Trimmed`. The model has to be built anew with the smaller vocabulary, ``len(trimmed.kept)``.

    Raises:
      ValueError, TypeError: for ids out of range, no integers or all there are; nothing found or too much; paths and
        axes that are not there; lengths that differ.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> head = {"kernel": jnp.ones((2, 5)), "bias": jnp.arange(5.0)}
      >>> params = {"embed": {"embedding": jnp.ones((5, 2))}, "head": head}
      >>> trimmed = fo.compression.remove_tokens(params, [1, 3])
      >>> print(trimmed.params["head"]["bias"], trimmed.id_map, trimmed.encode([4, 0]))
      [0. 2. 4.] [ 0 -1  1 -1  2] [2 0]
    """
    if leaves is not None:
        axes = of_user(params, leaves)
    elif apply_fn is not None:
        axes = of_program(apply_fn, params, batch, vocabulary)
    else:
        axes = of_names(params, vocabulary)
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    shapes = {"/".join(path_names(path)): jnp.shape(x) for path, x in flat}
    lengths = {path: shapes[path][axis] for path, axis in axes.items()}
    V = next(iter(lengths.values())) if vocabulary is None else vocabulary
    if wrong := {path: n for path, n in lengths.items() if n != V}:
        raise ValueError(f"remove_tokens: {wrong} along the axes of leaves=; wanted {V} tokens everywhere.")
    gone = _ids("remove_tokens", ids, V)
    retained = np.setdiff1d(np.arange(V), gone).astype(np.int32)
    id_map = np.full(V, -1, np.int32)
    id_map[retained] = np.arange(len(retained))

    def slice_(path: KeyPath, x: object) -> object:
        axis = axes.get("/".join(path_names(path)))
        return x if axis is None else jnp.take(jnp.asarray(x), retained, axis)

    return Trimmed(jax.tree_util.tree_map_with_path(slice_, params), jnp.asarray(id_map), jnp.asarray(retained))


def _ids(name: str, ids: Ids, V: int) -> np.ndarray:
    """Sorted, each once."""
    if isinstance(ids, Tracer):
        raise TypeError(f"{name}: ids shape the result: they cannot be traced, so give them outside of jit.")
    ids = np.asarray(ids)
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name}: ids must be integers; got {ids.dtype}. Of a mask, take np.flatnonzero(mask).")
    if (wrong := ids[(ids < 0) | (ids >= V)]).size:
        raise ValueError(f"{name}: ids lie between 0 and {V - 1}; got {_some(wrong)}.")
    if len(gone := np.unique(ids).astype(np.int64)) == V:
        raise ValueError(f"{name}: ids are all {V} tokens; one at least has to stay.")
    return gone


def _some(ids: np.ndarray) -> str:
    text = ", ".join(map(str, ids.ravel()[:8]))
    return f"ids {text}{', ...' if ids.size > 8 else ''}"


def removal_bias(ids: Ids, vocabulary: int, dtype: DTypeLike = jnp.float32) -> Float[Array, " vocabulary"]:
    """0, and -∞ for ``ids``: added to the logits, it removes tokens without slicing.

    Raises:
      ValueError, TypeError: for ids that `remove_tokens` would not take.

    Example:
      >>> import fisher_optax as fo
      >>> print(fo.compression.removal_bias([1], 3))
      [  0. -inf   0.]
    """
    return jnp.zeros(vocabulary, dtype).at[_ids("removal_bias", ids, vocabulary)].set(-jnp.inf)


def removal_loss_change(
    logits: Float[Array, "*positions vocabulary"], labels: ArrayLike, ids: Ids, weights: ArrayLike | None = None
) -> Float[Array, ""]:
    """By how much the mean loss changes when tokens are removed: the mean of ``log(1 - p_R)``, in nats, never above 0.

    Exact on texts without removed tokens. Where one is read, its embedding is needed and the text is not the model's
    any more; where one is the label, the loss without it is infinite.

    Args:
      logits, labels, weights: as for `fo.losses.softmax_cross_entropy`, with labels as class numbers. Computed in
        float32 at least, small p_R with full relative precision.
      ids: of the removed tokens, concrete.

    Raises:
      ValueError, TypeError: for ids that `remove_tokens` would not take, shapes that do not fit, and a removed label or
        one that is no class where its weight is not 0 (under `jit` the former gives ∞).

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> change = fo.compression.removal_loss_change(jnp.zeros((1, 4)), jnp.array([0]), [2, 3])
      >>> round(float(change), 4)  # p_R = 1/2
      -0.6931
    """
    z, labels = jnp.asarray(logits), jnp.asarray(labels)
    V, weightings = z.shape[-1], () if weights is None else (jnp.asarray(weights),)
    if labels.shape != z.shape[:-1] or any(w.shape != z.shape[: w.ndim] or w.ndim == z.ndim for w in weightings):
        shapes = f"logits {z.shape}, labels {labels.shape}" + "".join(f", weights {w.shape}" for w in weightings)
        raise ValueError(f"removal_loss_change: got {shapes}; wanted labels {z.shape[:-1]}, weights of leading axes.")
    removed = jnp.zeros(V, bool).at[_ids("removal_loss_change", ids, V)].set(True)
    w = example_weights(z, *weightings)
    lost = (w != 0) & ((labels < 0) | removed.at[labels].get(mode="fill", fill_value=True))
    if not isinstance(lost, Tracer) and bool(jnp.any(lost)):
        raise ValueError(
            f"removal_loss_change: labels {_some(np.unique(np.asarray(labels)[np.asarray(lost)]))} are removed or no "
            "class: the loss would be infinite. Give such positions the weight 0, or keep the tokens."
        )
    z = jnp.where((w == 0)[..., None], 0, z.astype(w.dtype))
    over = lambda chosen: jax.nn.logsumexp(jnp.where(chosen, z, -jnp.inf), -1)  # noqa: E731
    all_, stays, gone = jax.nn.logsumexp(z, -1), over(~removed), over(removed)
    p = jnp.exp(gone - all_)
    # The difference of two logarithms loses a small p_R, log1p one near 1.
    change = jnp.where(p < 0.5, jnp.log1p(-jnp.minimum(p, 0.5)), stays - all_)
    return jnp.sum(w * jnp.where(lost, jnp.inf, change)) / total(w)


def tokens_to_remove(
    importance: PyTree, count: int | None = None, *, threshold: float | None = None, level: float = 0.95
) -> Int[np.ndarray, " removed"]:
    """The ids of the least important tokens, the least first, ties by id.

    Args:
      importance: one number a token, or a `fo.fisher.DiagonalFisher` of one group a token: by
        ``groups=lambda path, s: s.sum(1) if path == "embed/embedding" else None``.
      count: how many;
      threshold: or all those certainly below it: the upper end of whose confidence interval is. Of plain numbers, there
        is no interval, and they are compared themselves.
      level: of the intervals.

    Raises:
      ValueError: for both of count and threshold or none; a count that is not between 0 and V - 1; importances that are
        not one finite number a token.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(fo.compression.tokens_to_remove(jnp.array([3.0, 1.0, 2.0, 1.0]), 3))
      [1 3 2]
    """
    if (count is None) == (threshold is None):
        raise ValueError(f"tokens_to_remove: give count or threshold; got count={count}, threshold={threshold}.")
    fisher = importance if isinstance(importance, DiagonalFisher) else None
    mean = _per_token(importance.mean if fisher else importance)
    order = np.argsort(mean, kind="stable")
    if count is None:
        upper = _per_token(fisher.confidence_interval(level)[1]) if fisher else mean
        return order[upper[order] < threshold]
    if not 0 <= count < len(mean):
        raise ValueError(
            f"tokens_to_remove: count lies between 0 and {len(mean) - 1}, as one token stays; got {count}."
        )
    return order[:count]


def _per_token(tree: PyTree) -> np.ndarray:
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    if len(leaves) != 1 or leaves[0].ndim != 1:
        raise ValueError(
            f"tokens_to_remove: got shapes {[x.shape for x in leaves][:4]}; wanted one number a token, (V,). Take the "
            "Fisher with groups= that sums the embedding's rows and gives None for other leaves."
        )
    require_finite("tokens_to_remove", np.where(np.isposinf(leaves[0]), 0, leaves[0]), "importance", "Look for NaN.")
    return leaves[0]
