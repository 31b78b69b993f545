"""One model out of several: each parameter nearest to the model that needs it most.

Near its own θ_i a task's loss is about ``½ (θ - θ_i)ᵀ F_i (θ - θ_i)`` above its minimum, F_i the Fisher there. The
weighted sum of these is least where

    (Σ c_i F_i) θ = Σ c_i F_i θ_i        with diagonal Fishers, entry by entry,  θ = Σ c_i F_i θ_i / Σ c_i F_i

Where no task has any curvature every θ is as good, and something else has to say which. Source: Matena and Raffel 2022
(arXiv 2111.09832), whose Fishers are diagonal.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..matrix.checking import Number
from .reading import aligned, diagonal_leaves, task_weights

FALLBACKS = ("average", "first", "raise")
PROBES = 16  # of a trace


class Merged(NamedTuple):
    """What `merge` returns."""

    params: PyTree  # like the models
    fallbacks: PyTree  # a tree like them: how many entries of each leaf took the fallback; None of operators
    residual: Float[Array, ""]  # |A δ - b| / |b| where conjugate gradients stopped; 0 of diagonals


def merge(
    models: Sequence[PyTree],
    fishers: Sequence[PyTree],
    *,
    coefficients: Sequence[ArrayLike] | ArrayLike | None = None,
    normalize: bool = False,
    floor: Number = 1e-6,
    fallback: str = "average",
    tolerance: float = 1e-6,
    iterations: int = 100,
) -> Merged:
    """The Fisher-weighted average of models (see the top of this file).

    With operators the joint minimiser is found by conjugate gradients from the average θ̄ of the models, as θ̄ + δ:

        (Σ c_i F_i + ρ I) δ = Σ c_i F_i (θ_i - θ̄)        the least of  Σ c_i ½ |θ - θ_i|²_{F_i} + ρ/2 |θ - θ̄|²

    with ρ = ``floor`` times the mean eigenvalue of ``Σ c_i F_i``. A direction in which no task has curvature, or one
    far below ρ, so keeps the average; iterates have no part in the first kind even at ρ = 0.

    Args:
      models: two or more trees of one structure. Integers, booleans and random states (counters, masks, the keys of
        dropout) are those of the first model, whatever the others have there, and Fishers none of theirs.
      fishers: one a model. Trees of diagonals like the models, a `fo.fisher.DiagonalFisher` by parameter, where None
        in the place of a leaf, or of all below it, is unknown, as are Flax's collections beside "params" that it has no
        entry for, such as batch statistics (the fallback decides there); or for all, `fo.fisher.operator`s or
        whatever has ``matvec(tree)`` and is symmetric without negative eigenvalues. An operator acts in the dtype of
        the parameters it was made with.
      coefficients: c, one a model, at least 0. None: 1.
      normalize: divide each Fisher by its trace. False: their scales count, and the result is the joint minimiser of
        losses in one unit. Worth trying where no validation data choose ``coefficients``: a trace says what a loss is
        measured in and how well it is fitted (an empirical Fisher goes to 0 with the training loss) rather than what a
        task is worth. Traces of operators are estimated by 16 products with random signs.
      floor: an entry whose ``Σ c_i F_i`` is at most this share of the mean one is taken for one without curvature. At
        the default, what is so decided holds at most a millionth of the trace. 0: only zeros are.
      fallback: who decides there: "average" (of the models with the coefficients c), "first" (the first model; of
        operators it takes the place of θ̄) or "raise" (an error; of diagonals alone, not under `jit`).
      tolerance: relative residual at which conjugate gradients stop;
      iterations: at most so many of them. `Merged.residual` says how far they got.

    Returns:
      A `Merged`; parameters in the dtypes of the first model, computed in float32 at least. Where all models agree they
      are kept to the bit.

    Raises:
      ValueError, TypeError: for trees that differ, with the path; another number of Fishers; negative or not finite
        Fishers and parameters (under `jit` such an entry of a diagonal counts as 0); coefficients that are negative or
        all 0; an unknown fallback, and one that "raise" forbids.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> models = {"w": jnp.array([0.0, 0.0, 0.0])}, {"w": jnp.array([1.0, 1.0, 1.0])}
      >>> fishers = {"w": jnp.array([3.0, 1.0, 0.0])}, {"w": jnp.array([1.0, 3.0, 0.0])}
      >>> merged = fo.compression.merge(models, fishers)
      >>> print(merged.params["w"], merged.fallbacks["w"])
      [0.25 0.75 0.5 ] 1
    """
    models, fishers = list(models), list(fishers)
    if len(models) < 2 or len(fishers) != len(models):
        raise ValueError(f"merge: got {len(models)} models and {len(fishers)} Fishers; wanted two or more, one each.")
    if fallback not in FALLBACKS:
        raise ValueError(f"merge: fallback must be one of {', '.join(map(repr, FALLBACKS))}; got {fallback!r}.")
    if not isinstance(floor, Tracer) and not 0 <= floor < 1:
        raise ValueError(f"merge: floor is a share of the mean Fisher, at least 0 and below 1; got {floor!r}.")
    paths, θ, structure, whole, rest = aligned("merge", {f"models[{i}]": tree for i, tree in enumerate(models)})
    c = task_weights("merge", "coefficients", coefficients, len(models))
    default = jnp.zeros(len(models)).at[0].set(1) if fallback == "first" else c / jnp.sum(c)
    acting = [hasattr(F, "matvec") for F in fishers]
    if all(acting):
        if fallback == "raise":
            raise ValueError("merge: with operators no entry falls back: fallback must be 'average' or 'first'.")
        joint = _joint(fishers, structure, θ, c, default, normalize, floor, tolerance, iterations)
        return joint._replace(params=whole(joint.params))
    if any(acting):
        raise TypeError("merge: got operators and diagonals; give one kind, as fo.fisher.diagonal(...) for each model.")
    F = [diagonal_leaves("merge", i, fisher, paths, θ[0], rest) for i, fisher in enumerate(fishers)]
    r, counts = entry_shares(F, θ[0], c, default, floor, normalize)
    if fallback == "raise":
        _require_none(paths, counts)
    merged = [_mix(*args) for args in zip(r, *θ, strict=True)]
    return Merged(whole(structure.unflatten(merged)), structure.unflatten(counts), jnp.zeros([]))


@jax.jit
def _mix(r: Array, first: Array, *others: Array) -> Array:
    """``Σ r_i θ_i`` with shares that sum to 1, by differences: equal parameters stay as they are."""
    x = first.astype(r.dtype)
    moves = (share * (other.astype(r.dtype) - x) for share, other in zip(r[1:], others, strict=True))
    return (x + sum(moves, jnp.zeros([], r.dtype))).astype(first.dtype)


@functools.partial(jax.jit, static_argnames="normalize")
def entry_shares(
    fishers: list[list[Array | None]],
    like: list[Array],
    c: Array,
    default: Array,
    floor: Array,
    normalize: bool,
) -> tuple[list[Array], list[Array]]:
    """Of each leaf, ``c_i F_i / Σ c F`` by model in front, ``default`` where that is unknown; and how often it is."""
    known = [all(F[k] is not None for F in fishers) for k in range(len(like))]
    places = [k for k, x in enumerate(known) if x]
    wide = [jnp.result_type(x, jnp.float32, *(F[k] for F in fishers if F[k] is not None)) for k, x in enumerate(like)]
    clean = lambda F, dtype: jnp.where((F > 0) & jnp.isfinite(F), F, 0).astype(dtype)  # noqa: E731
    G = {k: jnp.stack([clean(F[k], wide[k]) for F in fishers]) for k in places}
    # Relative to the largest, so that no product leaves the range of float32.
    over = lambda x, f: f(x.reshape(len(x), -1), 1, initial=0)  # noqa: E731
    top = functools.reduce(jnp.maximum, (over(G[k], jnp.max) for k in places), jnp.zeros(len(fishers)))
    safe = lambda x: jnp.where(x > 0, x, 1)  # noqa: E731
    G = {k: x / safe(_in_front(top, x)) for k, x in G.items()}
    trace = sum((over(x, jnp.sum) for x in G.values()), jnp.zeros(len(fishers)))
    w = c / safe(trace) if normalize else c * (top / safe(jnp.max(top)))
    mean = jnp.sum(w * trace) / max(sum(like[k].size for k in places), 1)
    shares, counts = [], []
    for k, x in enumerate(like):
        start = jnp.broadcast_to(default.astype(wide[k]).reshape(-1, *[1] * x.ndim), (len(fishers), *x.shape))
        if k in G:
            wG = _in_front(w, G[k]) * G[k]
            total = jnp.sum(wG, 0)
            decided = total > floor * mean
            start = jnp.where(decided, wG / jnp.where(decided, total, 1), start)
            counts.append(jnp.sum(~decided, dtype=jnp.int32))
        else:
            counts.append(jnp.array(x.size, jnp.int32))
        shares.append(start)
    return shares, counts


def _in_front(w: Array, x: Array) -> Array:
    return w.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def _require_none(paths: list[str], counts: list[Array]) -> None:
    if any(isinstance(n, Tracer) for n in counts):
        raise ValueError("merge: fallback='raise' has to see numbers: under jit take another and read `fallbacks`.")
    found = [(path, int(n)) for path, n in zip(paths, counts, strict=True) if int(n)]
    if found:
        raise ValueError(
            f"merge: no model has any Fisher for {found[0][1]} entries of {found[0][0]!r} ({len(found)} of "
            f"{len(paths)} leaves have such). Say by fallback='average' or 'first' what they shall be."
        )


def _joint(
    fishers: list[PyTree],
    structure: Any,
    θ: list[list[Array]],
    c: Array,
    default: Array,
    normalize: bool,
    floor: Number,
    tolerance: float,
    iterations: int,
) -> Merged:
    """By conjugate gradients on trees."""
    full = lambda leaves: [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in leaves]  # noqa: E731
    acts = [lambda v, F=F: full(jax.tree.leaves(F.matvec(structure.unflatten(v)))) for F in fishers]
    wide = [full(leaves) for leaves in θ]
    traces = jnp.stack([_trace(act, wide[0]) for act in acts])
    for i, trace in enumerate([] if isinstance(traces, Tracer) else traces):
        if not (jnp.isfinite(trace) and trace >= 0):
            raise ValueError(f"merge: fishers[{i}] has trace {trace:.3g}: a Fisher has no negative eigenvalue.")
    size = sum(x.size for x in wide[0])
    safe = lambda x: jnp.where(x > 0, x, 1)  # noqa: E731
    w = c / safe(traces if normalize else jnp.max(traces))
    # In units of the mean eigenvalue, which then is 1.
    w = w / safe(jnp.sum(w * traces) / size)

    def combined(vectors: list[list[Array]]) -> list[Array]:
        images = [act(v) for act, v in zip(acts, vectors, strict=True)]
        return [jnp.sum(_in_front(w, y := jnp.stack(x)) * y, 0) for x in zip(*images, strict=True)]

    A = lambda v: [y + floor * x for y, x in zip(combined([v] * len(acts)), v, strict=True)]  # noqa: E731
    start = [_mix(default.astype(x[0].dtype), *x) for x in zip(*wide, strict=True)]
    b = combined([[x - s for x, s in zip(model, start, strict=True)] for model in wide])
    δ, _ = cg(A, b, tol=tolerance, atol=0.0, maxiter=iterations)
    norm = lambda v: jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in v))  # noqa: E731
    left = norm([y - x for y, x in zip(A(δ), b, strict=True)])
    params = [(s + d).astype(x.dtype) for s, d, x in zip(start, δ, θ[0], strict=True)]
    return Merged(structure.unflatten(params), None, left / safe(norm(b)))


def _trace(act: Callable[[list[Array]], list[Array]], like: list[Array]) -> Array:
    """``E[zᵀ F z]`` over signs z (Hutchinson 1990)."""

    def product(key: PRNGKeyArray) -> Array:
        z = [
            jax.random.rademacher(k, x.shape, x.dtype)
            for k, x in zip(jax.random.split(key, len(like)), like, strict=True)
        ]
        return sum((jnp.sum(a * b) for a, b in zip(z, act(z), strict=True)), jnp.zeros([]))

    return jnp.mean(jax.lax.map(product, jax.random.split(jax.random.key(0), PROBES)))
