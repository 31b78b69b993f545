"""Spectra of operators from products alone: the largest eigenvalues, the density of all, and those of blocks.

Lanczos' iteration (1950; with full re-orthogonalisation) turns m products from a vector v into orthonormal rows Q
and a tridiagonal T = Q A Qᵀ = U diag(θ) Uᵀ:

    eigenvalues   A q ≈ θ q with q = Qᵀ u                extreme ones first
    quadrature    vᵀ f(A) v ≈ |v|² Σ_j U_1j² f(θ_j)      exact for polynomials of degree below 2m
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.special import stdtrit

from ..operators.operator import Operator
from .lanczos import SHAKE, checked_size, dtype_of, lanczos, product, require_finite

# Points of the default grid of a density, and how many widths it reaches beyond the nodes.
GRID_POINTS, GRID_MARGIN = 1001, 5


class Spectrum(NamedTuple):
    """The k largest eigenvalues of a matrix and their eigenvectors."""

    eigenvalues: Float[Array, " k"]  # descending
    vectors: Float[Array, "k d"]  # orthonormal rows; ``operator.unravel`` makes a tree of one
    residuals: Float[Array, " k"]  # |A v - λ v|: an eigenvalue of A is no farther from λ

    @property
    def converged(self) -> Array:
        """Where the residual is below ``√eps max|λ|``: λ, wrong by residual² / gap, then has all its digits, v half."""
        λ = self.eigenvalues
        return self.residuals <= jnp.sqrt(jnp.finfo(λ.dtype).eps) * jnp.max(jnp.abs(λ))

    @property
    def condition_number(self) -> Array:
        """``max|λ| / min|λ|`` of the k found, inf where that is rounding. Of a positive semi-definite matrix: a lower
        bound, its own only if k = D.
        """
        λ = jnp.abs(self.eigenvalues)
        singular = jnp.min(λ) <= 10 * jnp.finfo(λ.dtype).eps * jnp.max(λ)
        return jnp.where(singular, jnp.inf, jnp.max(λ) / jnp.where(singular, 1, jnp.min(λ)))

    @property
    def gaps(self) -> Float[Array, " g"]:
        """``(λ_i - λ_{i+1}) / |λ_1|``, k - 1 of them; 0 for the zero matrix."""
        top = jnp.abs(self.eigenvalues[0])
        return -jnp.diff(self.eigenvalues) / jnp.where(top > 0, top, 1)

    @property
    def gap(self) -> Array:
        """``(λ_1 - λ_2) / |λ_1|``; needs k >= 2."""
        if len(self.eigenvalues) < 2:
            raise ValueError("a gap needs two eigenvalues, and this spectrum has one: call spectrum with k >= 2.")
        return self.gaps[0]


def spectrum(
    operator: Operator,
    k: int = 20,
    *,
    iterations: int | None = None,
    key: PRNGKeyArray | None = None,
    tolerance: float | None = None,
) -> Spectrum:
    """The k largest eigenvalues (the largest, not those of largest size), by Lanczos' iteration.

    Copies of a multiple eigenvalue are found one after another, each when the one before has converged to rounding:
    ``converged`` says that a pair is one of A's, not that none was missed. ``iterations=D`` finds all.

    Args:
      operator: symmetric. Another one of the same kind and shapes does not compile anew.
      k: how many, at most D.
      iterations: products with A, ``max(2k, k + 20)`` by default (the last Ritz values are poor, so as many again are
        thrown away). They keep ``iterations x D`` numbers. Above D / 2 it is D products, and all eigenvalues are exact.
        Ask for more where some of the k have not converged.
      key: of the random start; ``jax.random.key(0)`` by default.
      tolerance: relative asymmetry ``|uᵀAv - vᵀAu| / (|Au| + |Av|)`` of one random pair that passes for rounding; the
        square root of the coarsest dtype's unit by default.

    Raises:
      ValueError: for k outside 1..D, fewer iterations than k, a matrix that is not symmetric, products that are not
        finite, and inside ``jit`` (all work is jitted in here).

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> A = fo.fisher.Operator.from_dense(jnp.diag(jnp.array([4.0, 1.0, 2.0])), jnp.zeros(3))
      >>> found = spectrum(A, 2)
      >>> print(found.eigenvalues.round(4), found.gap.round(4), found.condition_number.round(4))
      [4. 2.] 0.5 2.0
    """
    m = min(operator.size, max(2 * k, k + 20) if iterations is None else iterations)
    if not 1 <= k <= operator.size:
        raise ValueError(f"spectrum: k is {k}; wanted 1 to {operator.size}, the number of parameters.")
    if m < k:
        raise ValueError(f"spectrum: {m} iterations find {m} eigenvalues at most; got k={k}. Ask for {k} or more.")
    check, start = jax.random.split(jax.random.key(0) if key is None else key)
    found = _spectrum(operator, checked_size(operator, check, tolerance), start, m, k)
    require_finite(operator, found.residuals)
    return found


@functools.partial(jax.jit, static_argnums=(3, 4))
def _spectrum(operator: Operator, s: Array, key: PRNGKeyArray, m: int, k: int) -> Spectrum:
    shake, draw = jax.random.split(key)
    start = jax.random.normal(draw, (operator.size,), dtype_of(operator))
    _, V, _ = lanczos(operator, s, shake, start, m)
    # They are orthonormal to several units of rounding, and a length off by so much would show in λ.
    V = jnp.linalg.qr(V[: -k - 1 : -1].T)[0].T
    scale = jnp.where(s == 0, 1, s)
    AV = jax.lax.map(lambda v: product(operator, v), V) / scale
    λ = jnp.sum(V * AV, 1)
    order = jnp.argsort(-λ)
    λ, V, AV = λ[order], V[order], AV[order]
    return Spectrum(scale * λ, V, scale * jnp.linalg.norm(AV - λ[:, None] * V, axis=1))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("grid", "values", "standard_error", "nodes", "weights"),
    meta_fields=("size",),
)
@dataclasses.dataclass(frozen=True)
class Density:
    """How the D eigenvalues are spread: a probability density, from P random vectors. Error bars are over those."""

    grid: Float[Array, " g"]
    values: Float[Array, " g"]  # per unit of eigenvalue
    standard_error: Float[Array, " g"]
    nodes: Float[Array, "p m"]  # θ, ascending
    weights: Float[Array, "p m"]  # of each node; they sum to 1 for each vector
    size: int  # D

    def expectation(self, f: Callable[[Array], Array]) -> tuple[Array, Array]:
        """Mean of f over the eigenvalues, ``tr f(A) / D``, and its standard error; ``f`` takes an array.

        ``D * density.expectation(jnp.log)[0]`` is the log-determinant.

        Raises:
          ValueError: where f is not finite at a node, as the logarithm of a singular matrix: add a damping.
        """
        values = jnp.where(self.weights > 0, f(self.nodes), 0)
        bad = self.nodes[~jnp.isfinite(values)]
        if bad.size:
            raise ValueError(f"f is not finite at the node {bad[0]:.3g}: damp it, as in jnp.log(λ + damping).")
        return _mean(jnp.sum(self.weights * values, 1))

    @property
    def trace(self) -> Array:
        """Of A, by Hutchinson's estimate."""
        return self.size * self.expectation(lambda λ: λ)[0]

    @property
    def trace_standard_error(self) -> Array:
        """Of `trace`."""
        return self.size * self.expectation(lambda λ: λ)[1]

    def trace_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's interval for the trace, with P - 1 degrees of freedom, and room for rounding.

        It takes the estimates for normal. Where one eigenvalue makes up nearly all of the trace they are as skew as the
        square of a normal number, and few vectors give intervals that hold it less often than they say.
        """
        if not 0 < level < 1:
            raise ValueError(f"trace_interval: level is {level}; wanted a probability between 0 and 1.")
        rounding = SHAKE * jnp.finfo(self.nodes.dtype).eps * self.size * self.expectation(jnp.abs)[0]
        half = float(stdtrit(len(self.nodes) - 1, (1 + level) / 2) * self.trace_standard_error + rounding)
        return float(self.trace) - half, float(self.trace) + half


def _mean(x: Float[Array, "p *shape"]) -> tuple[Array, Array]:
    """Over vectors, with its standard error."""
    return jnp.mean(x, 0), jnp.std(x, 0, ddof=1) / len(x) ** 0.5


def density(
    operator: Operator,
    *,
    probes: int = 16,
    iterations: int = 40,
    key: PRNGKeyArray | None = None,
    grid: ArrayLike | None = None,
    width: float | None = None,
    tolerance: float | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Density:
    """Density of all D eigenvalues by stochastic Lanczos quadrature, each node smeared to a Gaussian.

    The random vectors are of signs: their length is exact, and so is the trace of a diagonal matrix, where normal ones
    add ``2 Σ A_ii²`` to its variance. Sources: Ubaru, Chen & Saad 2017; Ghorbani, Krishnan & Xiao 2019 for the
    smoothed density.

    Args:
      operator, tolerance: as in `spectrum`.
      probes: P, how many vectors, 2 at least: errors go down as its root.
      iterations: m products with A for each (D where m > D / 2): moments up to ``2m - 1`` are those of the vector
        exactly, and the density is resolved to about the m-th part of its range.
      key: of the vectors; ``jax.random.key(0)`` by default.
      grid: where to evaluate, increasing; by default 1001 points to five widths beyond the nodes.
      width: standard deviation of the Gaussians, in units of an eigenvalue; by default a hundredth of the nodes' range,
        or a thousandth of the largest where that is more.
      progress: wraps the loop over vectors, as ``tqdm.tqdm`` does.

    Raises:
      ValueError: as `spectrum`; for fewer than two probes; a width that is not positive; a grid that does not rise.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> A = fo.fisher.Operator.from_dense(jnp.diag(jnp.arange(1.0, 51.0)), jnp.zeros(50))
      >>> found = density(A, iterations=20)
      >>> print(found.trace.round(1), jnp.trapezoid(found.values, found.grid).round(4))
      1275.0 1.0
    """
    increasing = grid is None or (jnp.ndim(grid) == 1 and bool(jnp.all(jnp.diff(jnp.asarray(grid)) > 0)))
    if probes < 2 or iterations < 1 or not (width is None or width > 0) or not increasing:
        got = f"probes={probes}, iterations={iterations}, width={width}, grid={grid}"
        raise ValueError(f"density: got {got}; wanted 2 probes, 1 iteration at least, a positive width, a rising grid.")
    check, draw = jax.random.split(jax.random.key(0) if key is None else key)
    s, keys = checked_size(operator, check, tolerance), jax.random.split(draw, probes)
    m = min(iterations, operator.size)
    # Waited for, so that a progress bar shows what is done rather than what is asked for.
    found = [jax.block_until_ready(_quadrature(operator, s, keys[i], m)) for i in (progress or iter)(range(probes))]
    nodes, weights = (jnp.stack(x) for x in zip(*found, strict=True))
    require_finite(operator, nodes)
    low, high, largest = jnp.min(nodes), jnp.max(nodes), jnp.max(jnp.abs(nodes))
    σ = jnp.maximum((high - low) / 100, jnp.where(largest == 0, 1, largest / 1000)) if width is None else width
    margin = GRID_MARGIN * σ
    x = jnp.linspace(low - margin, high + margin, GRID_POINTS) if grid is None else jnp.asarray(grid, nodes.dtype)
    values, error = _smoothed(nodes, weights, x, σ)
    return Density(x, values, error, nodes, weights, operator.size)


@functools.partial(jax.jit, static_argnums=3)
def _quadrature(operator: Operator, s: Array, key: PRNGKeyArray, m: int) -> tuple[Array, Array]:
    """Nodes and weights of one vector."""
    shake, draw = jax.random.split(key)
    θ, _, w = lanczos(operator, s, shake, jax.random.rademacher(draw, (operator.size,), dtype_of(operator)), m)
    return θ, w


@jax.jit
def _smoothed(θ: Array, w: Array, x: Array, σ: ArrayLike) -> tuple[Array, Array]:
    """The density at x and its standard error."""
    each = jax.lax.map(lambda p: jax.scipy.stats.norm.pdf(x[:, None], p[0], σ) @ p[1], (θ, w))
    return _mean(each)
