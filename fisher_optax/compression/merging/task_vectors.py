"""Arithmetic with task vectors ``τ_i = θ_i - θ_0``, what fine-tuning a base θ_0 on task i has changed.

task arithmetic   θ_0 + Σ λ_i τ_i                                   Ilharco et al. 2023 (arXiv 2212.04089)
with Fishers      θ_0 + Σ λ_i F_i / (Σ F) τ_i, entry by entry       as Matena and Raffel 2022 (arXiv 2111.09832)
TIES              the largest of each τ_i, and the mean of those whose sign has the larger sum
                                                                    Yadav et al. 2023 (arXiv 2306.01708)
DARE              some entries of τ at random, rescaled             Yu et al. 2024 (arXiv 2311.03099)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray, PyTree

from ...matrices.floats import without_rest
from ..matrix.checking import Number
from ..matrix.masks import global_masks
from .merge import entry_shares
from .reading import Aligned, aligned, diagonal_leaves


def task_vector(base: PyTree, tuned: PyTree) -> PyTree:
    """``tuned - base``, in float32 at least: differences of bfloat16 numbers do not fit into bfloat16. None for
    integers, booleans and random states, which take no part in what follows: results have the base's.

    Raises:
      ValueError, TypeError: for trees that differ (with the path), and parameters that are not finite or complex.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> print(fo.compression.task_vector({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.5, 2.0])})["w"])
      [0.5 0. ]
    """
    _, (start, end), structure, *_ = aligned("task_vector", {"base": base, "tuned": tuned})
    return structure.unflatten([_wide(y) - _wide(x) for x, y in zip(start, end, strict=True)])


def add_task_vectors(
    base: PyTree,
    vectors: Sequence[PyTree],
    *,
    scale: Sequence[ArrayLike] | ArrayLike = 1.0,
    fishers: Sequence[PyTree] | None = None,
    normalize: bool = False,
) -> PyTree:
    """``base + Σ λ_i τ_i``; with Fishers each entry of τ_i has the share ``F_i / Σ F`` of it, too.

    Shares sum to 1. So with ``scale=1`` and Fishers this is `fo.compression.merge` of the tuned models, and with equal
    Fishers of n tasks ``scale=n`` is the plain sum. Where no task has any Fisher, shares are equal.

    Args:
      base: the parameters that all were tuned from.
      vectors: of `task_vector`.
      scale: λ, one number or one a vector; negative ones take a task away. The paper chooses one for all, on validation
        data, between 0 and 1; 1 is right for a single task.
      fishers: one a vector, trees of diagonals or `fo.fisher.DiagonalFisher`, as `fo.compression.merge` takes them;
      normalize: each divided by its trace first (as there).

    Returns:
      Parameters in the base's dtypes.

    Raises:
      ValueError, TypeError: for trees that differ (with the path), what is not finite, no vectors, another number of
        scales or Fishers.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> base, one, two = (jnp.array(x) for x in ([0.0, 0.0], [1.0, 1.0], [2.0, 0.0]))
      >>> print(fo.compression.add_task_vectors(base, [one, two], scale=0.5))
      [1.5 0.5]
    """
    vectors = list(vectors)
    both, start, τ = _read("add_task_vectors", base, vectors)
    λ = jnp.asarray(scale, jnp.result_type(float))
    if λ.shape not in ((), (len(vectors),)):
        raise ValueError(f"add_task_vectors: scale is a number or {len(vectors)} of them; got {λ.shape}.")
    λ = jnp.broadcast_to(λ, len(vectors))
    weights = [λ.reshape(-1, *[1] * x.ndim) for x in start]
    if fishers is not None:
        if len(fishers := list(fishers)) != len(vectors):
            raise ValueError(f"add_task_vectors: got {len(vectors)} vectors and {len(fishers)} Fishers; give as many.")
        name = "add_task_vectors"
        F = [diagonal_leaves(name, i, fisher, both.paths, start, both.rest) for i, fisher in enumerate(fishers)]
        equal = jnp.full(len(vectors), 1 / len(vectors))
        shares, _ = entry_shares(F, start, jnp.ones(len(vectors)), equal, 0.0, normalize)
        weights = [w * r for w, r in zip(weights, shares, strict=True)]
    moved = [_move(x, jnp.sum(w * jnp.stack(t), 0)) for x, w, t in zip(start, weights, τ, strict=True)]
    return both.whole(both.structure.unflatten(moved))


def ties(base: PyTree, vectors: Sequence[PyTree], density: Number = 0.2, scale: Number = 1.0) -> PyTree:
    """TIES: trim, elect the sign, and average what agrees; algorithm 1 of the paper.

    Of each vector the largest magnitudes over the whole model stay. Each entry's sign is that of the sum of what
    stayed, and ``base + λ mean`` the result, the mean over the vectors whose entry has that sign. An entry that nothing
    stays of, or whose sum is 0, keeps the base.

    Args:
      base, vectors: as for `add_task_vectors`.
      density: the share that stays, in (0, 1], exactly all but ``⌈(1 - density) n⌉`` of a vector's n entries; of equal
        magnitudes the later. The paper's 0.2. 1 trims nothing: for vectors of `dare`, which have been.
      scale: λ. The paper's 1, without validation data.

    Raises:
      ValueError, TypeError: for another density, and as in `add_task_vectors`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> vectors = jnp.array([4.0, 1.0, -3.0, 0.0]), jnp.array([2.0, 1.0, 5.0, 0.0])
      >>> print(fo.compression.ties(jnp.zeros(4), vectors, density=0.5))
      [3. 0. 5. 0.]
    """
    if not isinstance(density, Tracer) and not 0 < density <= 1:
        raise ValueError(f"ties: density is the share that stays, above 0 and at most 1; got {density!r}.")
    both, start, τ = _read("ties", base, list(vectors))
    trimmed = [_trim([t[i] for t in τ], density) for i in range(len(τ[0]))]
    merged = [_agreeing(jnp.stack(entries)) for entries in zip(*trimmed, strict=True)]
    return both.whole(both.structure.unflatten([_move(x, scale * m) for x, m in zip(start, merged, strict=True)]))


def _trim(vector: list[Array], density: Number) -> list[Array]:
    stays = global_masks([jnp.abs(x) for x in vector], 1 - density)
    return [jnp.where(keep, x, 0) for keep, x in zip(stays, vector, strict=True)]


def _agreeing(τ: Array) -> Array:
    """The mean of the entries that have the sign of their sum."""
    agrees = τ * jnp.sign(jnp.sum(τ, 0)) > 0
    return jnp.sum(jnp.where(agrees, τ, 0), 0) / jnp.maximum(jnp.sum(agrees, 0), 1)


def dare(key: PRNGKeyArray, vector: PyTree, p: Number) -> PyTree:
    """Each entry dropped with probability p, the others divided by 1 - p: the mean stays as it is.

    Args:
      key: a `jax.random.key`; another one for each vector.
      vector: of `task_vector`; what is no floating point in it passes through.
      p: in [0, 1). The paper goes to 0.9 and above with language models, with entries that are many and small.

    Raises:
      ValueError: for another p.

    Example:
      >>> import jax, jax.numpy as jnp, fisher_optax as fo
      >>> print(jnp.unique(fo.compression.dare(jax.random.key(0), jnp.ones(100), 0.5)))
      [0. 2.]
    """
    if not isinstance(p, Tracer) and not 0 <= p < 1:
        raise ValueError(f"dare: p is a probability, at least 0 and below 1; got {p!r}.")
    floats, whole = without_rest(vector)
    leaves, structure = jax.tree.flatten(floats)
    keys = jax.random.split(key, max(len(leaves), 1))
    thin = lambda k, x: jnp.where(jax.random.bernoulli(k, 1 - p, x.shape), _wide(x) / (1 - p), 0).astype(x.dtype)  # noqa: E731
    return whole(structure.unflatten([thin(k, jnp.asarray(x)) for k, x in zip(keys, leaves, strict=False)]))


def _read(name: str, base: PyTree, vectors: list[PyTree]) -> tuple[Aligned, list[Array], list[list[Array]]]:
    """All of them, the base's leaves, and for each of these all vectors'."""
    if not vectors:
        raise ValueError(f"{name}: got no task vectors; give some, of fo.compression.task_vector(base, tuned).")
    trees = {"base": base, **{f"vectors[{i}]": τ for i, τ in enumerate(vectors)}}
    both = aligned(name, trees)
    start, *τ = both.leaves
    return both, start, [[_wide(x) for x in entries] for entries in zip(*τ, strict=True)]


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _move(x: Array, step: Array | np.ndarray) -> Array:
    return (_wide(x) + step).astype(x.dtype)
