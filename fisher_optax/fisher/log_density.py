"""The Fisher of any log-density, from the gradients of log p_θ at points x: the half of `geometry` that makes F.

E is over p_θ itself: points ``xs`` with ``weights`` w, their probabilities: an exact enumeration of outcomes, the nodes
of a quadrature, or samples of p_θ with none. (Data in their place give the empirical Fisher.) θ is any tree of floats,
its D numbers in the order of `jax.flatten_util.ravel_pytree`. These run as written, for many points best as
``jax.jit(information, static_argnums=0)``; weights are then not checked.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.lax import Precision
from jax.tree_util import keystr, tree_leaves_with_path
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, PyTree

from .._xla import of_each

LogDensity = Callable[[PyTree, PyTree], ArrayLike]
Weights = ArrayLike | Sequence[ArrayLike]


def score(log_density: LogDensity, theta: PyTree, x: PyTree) -> PyTree:
    """``∂ log p_θ(x) / ∂θ``, a tree like ``theta``, in float32 at least.

    Args:
      log_density: ``(theta, x) -> log p_θ(x)``, a scalar, in nats.
      theta: a tree of floats.
      x: one point, anything that ``log_density`` takes.

    Raises:
      TypeError: where a leaf of ``theta`` is no float.
      ValueError: where ``log_density`` gives no scalar.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> log_p = lambda θ, x: -jnp.square(x - θ["mean"]) / 2  # constants do not matter
      >>> print(fo.fisher.geometry.score(log_p, {"mean": 1.0}, 3.0))
      {'mean': Array(2., dtype=float32)}
    """
    log_p, θ, unravel = _raveled(log_density, theta)
    return unravel(jax.grad(log_p)(θ, x))


def information(
    log_density: LogDensity, theta: PyTree, xs: PyTree, weights: Weights | None = None, form: str = "score"
) -> Float[Array, "d d"]:
    """``F(θ)``, as ``Σ w s sᵀ`` or as ``-Σ w ∂² log p``.

    Args:
      log_density, theta: as in `score`.
      xs: points, a tree with one leading axis.
      weights: the probability of each, used as it comes; a point of weight 0 is not there. None: 1/N each.
      form: ``"score"``, positive semidefinite whatever the points; ``"hessian"``, the same only in exact expectation,
        often with less noise from samples.

    Raises:
      TypeError, ValueError: as `score`; ValueError for another ``form``, for weights that do not fit the points, are
        negative or not finite.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> log_p = lambda p, x: jnp.where(x, jnp.log(p), jnp.log1p(-p))
      >>> print(fo.fisher.geometry.information(log_p, 0.5, jnp.array([True, False]), [0.5, 0.5]))
      [[4.]]
    """
    if form == "score":
        s, w, _ = _scores(log_density, theta, xs, weights)
        return _gram(w, s)
    if form != "hessian":
        raise ValueError(f'form must be "score" or "hessian"; got {form!r}.')
    log_p, θ, _ = _raveled(log_density, theta)
    points, w = _points(xs, weights, θ.dtype)
    values = lambda θ: of_each(lambda x: log_p(θ, x), points)  # noqa: E731
    slope = jax.grad(lambda θ: jnp.vdot(w, values(θ), precision=Precision.HIGHEST))
    return -of_each(lambda e: jax.jvp(slope, (θ,), (e,))[1], jnp.eye(len(θ), dtype=θ.dtype))


def statistic_information(
    log_density: LogDensity,
    theta: PyTree,
    xs: PyTree,
    statistic: Callable[[PyTree], ArrayLike],
    weights: Weights | None = None,
) -> Float[Array, "d d"]:
    """``F_T(θ)``, what is left when T(x) is seen instead of x: ``E[s̃ s̃ᵀ]`` with ``s̃(t) = E[s | T = t]``.

    Points with exactly equal T(x) are put together, so ``xs`` has to enumerate the outcomes. Takes N² memory.

    Args:
      log_density, theta, xs, weights: as in `information`.
      statistic: T, from one point to an array.

    Raises:
      TypeError, ValueError: as `information`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> log_p = lambda p, x: jnp.where(x, jnp.log(p), jnp.log1p(-p))
      >>> print(fo.fisher.geometry.statistic_information(log_p, 0.5, jnp.array([True, False]), lambda x: 0 * x))
      [[0.]]
    """
    s, w, points = _scores(log_density, theta, xs, weights)
    t = jax.vmap(lambda x: jnp.ravel(statistic(x)))(points)
    together = w * jnp.all(t[:, None] == t, -1)
    q = jnp.sum(together, 1, keepdims=True)
    means = jnp.matmul(together, s, precision=Precision.HIGHEST) / jnp.where(q == 0, 1, q)
    return _gram(w, means)


def promoted(x: ArrayLike) -> Array:
    """In float32 at least."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _raveled(log_density: LogDensity, theta: PyTree) -> tuple[LogDensity, Array, Callable[[Array], PyTree]]:
    """``log p`` of a vector, that vector, and its way back to a tree."""
    kinds = {keystr(path) or "theta": jnp.result_type(x) for path, x in tree_leaves_with_path(theta)}
    other = [f"{path} is {kind}" for path, kind in kinds.items() if not jnp.issubdtype(kind, jnp.floating)]
    if other or not kinds:
        raise TypeError(
            f"theta must be a tree of floats, but {', '.join(other) or 'is empty'}. "
            "Let the log-density close over what is no parameter."
        )
    θ, unravel = ravel_pytree(jax.tree.map(promoted, theta))

    def log_p(θ: Array, x: PyTree) -> Array:
        value = jnp.asarray(log_density(unravel(θ), x))
        if value.shape:
            raise ValueError(f"log_density must give one number for one point; got shape {value.shape}. Sum over it?")
        return value

    return log_p, θ, unravel


def _points(xs: PyTree, weights: Weights | None, dtype: DTypeLike) -> tuple[PyTree, Array]:
    """Points that can be evaluated, and the weight of each."""
    xs = jax.tree.map(jnp.asarray, xs)
    lengths = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(xs)}
    n = lengths.pop() if len(lengths) == 1 else 0
    if n == 0:
        raise ValueError(f"xs must be points along one leading axis; got shapes {jax.tree.map(jnp.shape, xs)}.")
    if weights is None:
        return xs, jnp.full(n, 1 / n, dtype)
    w = jnp.asarray(weights, dtype)
    if w.shape != (n,):
        raise ValueError(f"xs has {n} points, so weights must have shape ({n},), one each; got {w.shape}.")
    if not isinstance(w, Tracer) and not jnp.all((w >= 0) & jnp.isfinite(w)):
        raise ValueError("weights are probabilities: none may be negative, infinite or NaN.")
    # Where p(x) = 0 a score may be infinite, and 0 times it is not 0.
    there = jnp.where(w == 0, jnp.argmax(w), jnp.arange(n))
    return jax.tree.map(lambda x: x[there], xs), w


def _scores(log_density: LogDensity, theta: PyTree, xs: PyTree, weights: Weights | None) -> tuple[Array, Array, PyTree]:
    """Of each point, as rows; the weights; the points."""
    log_p, θ, _ = _raveled(log_density, theta)
    points, w = _points(xs, weights, θ.dtype)
    return of_each(lambda x: jax.grad(log_p)(θ, x), points), w, points


def _gram(w: Float[Array, " n"], s: Float[Array, "n d"]) -> Float[Array, "d d"]:
    """``Σ w s sᵀ``."""
    return jnp.matmul(s.T, w[:, None] * s, precision=Precision.HIGHEST)
