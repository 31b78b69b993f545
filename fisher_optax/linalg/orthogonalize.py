"""The polar factor of a matrix by Newton-Schulz iterations, on the matrix itself or on its small Gram matrix."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Inexact

from .._xla import Platform, by_platform
from .polynomials import Polynomial, as_polynomial, polar_express
from .products import Products, Symmetric, inverse_root, row_sizes, unit_frobenius, unit_scale

# How far rounding may carry an eigenvalue of R before a Gram iteration restarts: less than the polynomials' own ripple.
# Measured, float32 to bfloat16, rank one, half rank and singular values to 1e-6: bounded at .13, divergent at .27.
DRIFT = 0.1
# Matrices with a shorter side have products that take no time; "direct" compiles in two thirds of the time of "gram".
SMALL = 32


def orthogonalize(
    X: Inexact[Array, "*batch m n"],
    polynomial: Sequence[Sequence[float]] = polar_express(5),
    *,
    method: str = "auto",
    restarts: tuple[int, ...] | None = None,
    precision: PrecisionLike = None,
    dtype: DTypeLike | None = None,
) -> Inexact[Array, "*batch m n"]:
    """``U p(S) Vᵀ`` for ``X / |X| = U S Vᵀ`` and p about 1: the nearest (semi-)orthogonal matrix, by products alone.

    Each matrix is divided by its Frobenius norm in float32 at least, with no epsilon: a zero matrix stays exactly zero,
    any other of any scale is orthogonalised, and a value that is not finite makes its matrix not finite. Then, with
    n the short side and m the long one, for each (a, b, c)

        direct:  A = X Xᵀ;  X ← a X + (b A + c A²) X                   5 products, 2 of them with X
        gram:    Z = b R + c R²;  Q ← a Q + Z Q;  R ← h R h            4 products of n x n matrices alone
                 where R = X Xᵀ and Q = I at first, h = a I + Z; at the end X ← Q X

    Products of n x n matrices are symmetric, and computed in blocks where that is faster (`linalg.products`).

    Later factors go on the left of Q: all factors commute but for rounding, and this order keeps the rounding of one
    step from being amplified by the others, which makes it 10 to 100 times smaller.

    Args:
      X: matrices in the last two axes; tall ones are multiplied from the right instead of being transposed. Where they
        are complex, ᵀ is the conjugate transpose everywhere, and the result is (semi-)unitary.
      polynomial: a triple (a, b, c) for each step; default `polar_express()`.
      method: "direct", "gram", or "auto": the one with fewer flops, which is "gram" where ``m > 1.5 n``; but "direct",
        which is the shorter program and the more accurate one, where ``n < 32`` and flops take no time.
      restarts: steps before which "gram" forms X and R anew. R loses the square of a singular value to rounding below
        its unit roundoff u, and the error grows by a² a step; ``None`` restarts before it reaches .1 (`restart_steps`):
        never for five Polar Express steps in float32, once for eight, once for five in float16 or TF32.
      precision: of the products, as in `jax.numpy.matmul`.
      dtype: what the products' operands are rounded to, complex64 at least where X is complex; sums are float32 at
        least. Default: float32 for half types, the input's own otherwise. In half types "direct" is the more accurate
        one: on matrices of low rank it errs by .01 in float16 and .05 in bfloat16, "gram" by .08 and .6.

    Returns:
      An array like X. In float32 and five Polar Express steps it is within 1e-4 of exact arithmetic for "direct", and
      within .012 for "gram" (worst for singular values of 1e-3 of the largest, 5e-5 for well-conditioned X).

    Raises:
      TypeError: if X is not floating point, or ``dtype`` not real floating point.
      ValueError: if X has fewer than two axes, or for an unknown method, a bad polynomial or bad restarts.

    Source: Jordan et al. 2024 (Muon); Amsel et al. 2025 (arXiv 2505.16932); Gram iterations: Zhang et al. 2026.

    >>> print(orthogonalize(jnp.diag(jnp.array([3.0, -1.0, 0.0])), polar_express(8)).round(3))
    [[ 1.  0.  0.]
     [ 0. -1.  0.]
     [ 0.  0.  0.]]
    """
    polynomial = as_polynomial(polynomial)
    dtype = _check(X, method, dtype)
    if restarts is not None and list(restarts) != sorted(set(restarts) & set(range(1, len(polynomial)))):
        raise ValueError(
            f"orthogonalize: restarts must be increasing steps from 1 to {len(polynomial) - 1} "
            f"(the polynomial has {len(polynomial)} steps, counted from 0); got {restarts!r}."
        )
    short, long = sorted(X.shape[-2:])

    def plan(platform: Platform) -> _Plan:
        rows = row_sizes(short, platform.symmetric_blocks)
        wanted = restarts
        if wanted is None:
            wanted = restart_steps(polynomial, _unit_roundoff(dtype, precision, platform.roundoff))
        fewer = gram_flops(rows, long, len(polynomial), wanted) < direct_flops(rows, long, len(polynomial))
        gram = method == "gram" or (method == "auto" and fewer and short >= SMALL)
        return _Plan(rows, tuple(wanted) if gram else None)

    def run(plan: _Plan, X: Array) -> Array:
        products = Products(X.shape[-2] > X.shape[-1], plan.rows, dtype, precision)
        Y = X.astype(_at_least_float32(X.dtype))
        if plan.restarts is None:
            return _direct(Y, polynomial, products)
        return _gram(Y, polynomial, plan.restarts, products)

    return by_platform(run, plan, X).astype(X.dtype)


class _Plan(NamedTuple):
    """What is done with a matrix on a platform."""

    rows: tuple[int, ...]  # of blocks of symmetric products
    restarts: tuple[int, ...] | None  # of a Gram iteration; None: the direct one


def direct_flops(rows: tuple[int, ...], long: int, steps: int) -> int:
    """Flops of the products of a direct iteration: ``(4 n² m + 2 n³) T`` for sides n <= m; less where symmetric
    products are computed in several ``rows`` of blocks, which n is the sum of.

    >>> direct_flops((1,), 4, 5)
    90
    """
    return steps * (symmetric_flops(rows, long) + 2 * sum(rows) ** 2 * long + symmetric_flops(rows))


def gram_flops(rows: tuple[int, ...], long: int, steps: int, restarts: Sequence[int] = ()) -> int:
    """Flops of the products of a Gram iteration: ``4 n² m K + (8 T - 6 K) n³``, K = one more than there are restarts;
    less where symmetric products are computed in several ``rows`` of blocks, which n is the sum of.

    >>> gram_flops((1,), 4, 5), gram_flops((1,), 4, 5, (2,))
    (50, 60)
    """
    runs = len(restarts) + 1
    big = symmetric_flops(rows, long) + 2 * sum(rows) ** 2 * long
    return runs * big + (4 * steps - 3 * runs) * symmetric_flops(rows)


@functools.lru_cache
def restart_steps(polynomial: Polynomial, unit_roundoff: float) -> tuple[int, ...]:
    """As few restarts of a Gram iteration as keep rounding in bounds, placed so that it grows least.

    A spurious eigenvalue u of R (a singular value below sqrt(u), or none at all) is multiplied by a² in a step; it must
    not reach .1 before X is formed anew.

    Args:
      polynomial: a triple (a, b, c) for each step.
      unit_roundoff: of the products, e.g. 2**-24 for float32.

    >>> restart_steps(polar_express(5), 2**-24), restart_steps(polar_express(5), 2**-11)
    ((), (2,))
    """
    gains = [a * a for a, _, _ in polynomial]

    def placed(limit: float) -> tuple[int, ...]:
        steps, growth = [], 1.0
        for i in range(1, len(gains)):
            growth *= gains[i - 1]
            if growth > limit:
                steps.append(i)
                growth = 1.0
        return tuple(steps)

    fewest = placed(DRIFT / unit_roundoff)
    growths = (g for i in range(len(gains)) for g in itertools.accumulate(gains[i:], lambda x, y: x * y))
    return next((steps for limit in sorted(growths) if len(steps := placed(limit)) <= len(fewest)), fewest)


def _direct(X: Array, polynomial: Polynomial, products: Products) -> Array:
    def step(X: Array, h: Array) -> tuple[Array, None]:
        a, b, c = h
        A = products.outer(X)
        return a * X + products.apply(combine(b, A, c, products.product(A, A)), X), None

    # A loop over the steps, here and below, is compiled once instead of once a step.
    return jax.lax.scan(step, unit_frobenius(X), _coefficients(polynomial, X))[0]


# R, Z and Q.
_Carry = tuple[Symmetric, Symmetric, Symmetric]


def _gram(X: Array, polynomial: Polynomial, restarts: tuple[int, ...], products: Products) -> Array:
    def step(carry: _Carry, hs: tuple[Array, Array]) -> tuple[_Carry, None]:
        (R, Z, Q), ((a_before, _, _), (a, b, c)) = carry, hs
        hR = combine(a_before, R, 1, products.product(Z, R))
        R = combine(a_before, hR, 1, products.product(hR, Z))
        Z = combine(b, R, c, products.product(R, R))
        # a stays out of Z: next to it the small eigenvalues of Z would be rounded away.
        return (R, Z, combine(a, Q, 1, products.product(Z, Q))), None

    X, h = unit_scale(X), _coefficients(polynomial, X)
    for start, stop in itertools.pairwise((0, *restarts, len(polynomial))):
        R = products.outer(X)
        # The trace of X Xᵀ is the squared Frobenius norm; dividing small matrices by it spares dividing X.
        s = inverse_root(trace(R))[..., None, None] if start == 0 else jnp.ones([], h.dtype)
        R = tuple(r * (s * s) for r in R)
        a, b, c = h[start]
        Z = combine(b, R, c, products.product(R, R))
        (_, _, Q), _ = jax.lax.scan(step, (R, Z, add_identity(a, Z)), (h[start : stop - 1], h[start + 1 : stop]))
        X = products.apply(tuple(q * s for q in Q), X)
    return X


def _check(X: Array, method: str, dtype: DTypeLike | None) -> jnp.dtype:
    """The dtype of the products, or what is wrong."""
    if not jnp.issubdtype(X.dtype, jnp.inexact):
        raise TypeError(f"orthogonalize: X must be floating point; got {X.dtype}. Cast it first.")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"orthogonalize: dtype must be real floating point; got {jnp.dtype(dtype)}.")
    if X.ndim < 2:
        raise ValueError(f"orthogonalize: X needs two axes or more, the last two the matrix; got shape {X.shape}.")
    if method not in ("auto", "direct", "gram"):
        raise ValueError(f"orthogonalize: method must be 'auto', 'direct' or 'gram'; got {method!r}.")
    dtype = jnp.dtype(dtype or _at_least_float32(X.dtype))
    return jnp.promote_types(dtype, jnp.complex64) if jnp.iscomplexobj(X) else dtype


def _coefficients(polynomial: Polynomial, X: Array) -> Array:
    return jnp.asarray(polynomial, jnp.finfo(X.dtype).dtype)


def _at_least_float32(dtype: DTypeLike) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _unit_roundoff(dtype: DTypeLike, precision: PrecisionLike, default: float) -> float:
    """Of products with these operands; ``default``: of float32 ones on a platform, where no precision is asked for."""
    dtype = jnp.finfo(dtype).dtype  # of the parts, where it is complex
    if precision is None:
        precision = getattr(jax.config, "jax_default_matmul_precision", None)
    full = (jax.lax.Precision.HIGHEST, "highest", "float32", (jax.lax.Precision.HIGHEST,) * 2)
    if dtype != jnp.float32 or precision in full:
        return float(jnp.finfo(dtype).eps) / 2
    # An algorithm has operands of its own, on a CPU too; of the others, those that ask for more are as good.
    return default if _is_level(precision) else 2.0**-9


def _is_level(precision: PrecisionLike) -> bool:
    """Whether it asks for a number of passes, which a CPU ignores, rather than for an algorithm with its own dtype."""
    levels = precision if isinstance(precision, tuple) else (precision,)
    names = ("default", "fastest", "high", "bfloat16", "bfloat16_3x", "tensorfloat32")
    return all(level is None or isinstance(level, jax.lax.Precision) or level in names for level in levels)


def symmetric_flops(rows: tuple[int, ...], m: int | None = None) -> int:
    """Flops of a symmetric product of n x m by m x n, n the sum of ``rows`` and m = n by default.

    >>> symmetric_flops((2,)), symmetric_flops((1, 1))
    (16, 12)
    """
    n = sum(rows)
    return (n * n + sum(r * r for r in rows)) * (n if m is None else m)


def combine(a: Array | float, S: Symmetric, b: Array | float, T: Symmetric) -> Symmetric:
    """``a S + b T``."""
    return tuple(a * s + b * t for s, t in zip(S, T, strict=True))


def add_identity(a: Array | float, S: Symmetric) -> Symmetric:
    """``a I + S``."""
    return tuple(s + a * i for s, i in zip(S, _identity(S), strict=True))


def trace(S: Symmetric) -> Float[Array, "*batch"]:
    """The sum of the diagonal, which is real."""
    # On a CPU, XLA compiles three kernels for a slice of the diagonal and its sum; this it leaves to a library.
    parts = (jnp.sum(s * i, (-2, -1)) for s, i in zip(S, _identity(S), strict=True))
    return functools.reduce(jnp.add, parts).real


def _identity(S: Symmetric) -> Symmetric:
    """I, cut like S."""
    firsts = [0, *np.cumsum([s.shape[-2] for s in S[:-1]]).tolist()]
    return tuple(jnp.eye(s.shape[-2], s.shape[-1], first, s.dtype) for s, first in zip(S, firsts, strict=True))
