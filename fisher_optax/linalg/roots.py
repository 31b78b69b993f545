"""Negative powers of positive semi-definite matrices: by eigenvalues, and by matrix products alone.

All of them damp: eigenvalues below ``ridge`` times the largest count as that, or are raised by it, since a float32
computation knows none of them to better than 1e-7 of the largest. A zero matrix has the identity as its power.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .blocks import one_by_one
from .following import apart_last
from .polynomials import polar_express
from .products import times, unit_scale

METHODS = ("eigh", "newton", "polynomial")
# Steps of the iterations at most: both converge in far fewer for condition numbers to 1e7.
NEWTON_STEPS, POLYNOMIAL_STEPS = 100, 12
# Blocks up to this size are factorised by LAPACK, bordered to twice that: seen to stay on one of two threads there.
LEAF = 126


def matrix_power(
    A: Float[Array, "d d"], exponent: float, *, method: str = "eigh", ridge: ArrayLike = 1e-6
) -> Float[Array, "d d"]:
    """``(A + ridge |A| I)^exponent`` for an exponent from -1 to 0, |A| the largest eigenvalue or a bound on it.

    Args:
      A: symmetric, positive semi-definite, of any scale; float32 at least.
      exponent: of each eigenvalue.
      method: "eigh" (any exponent); "newton" (coupled Newton, exponents -1/p); "polynomial" (coupled polynomials of the
        sign function, Polar Express's, exponents -1/2, -1/4, -1/8 ...). The last two are matrix products alone.
      ridge: relative to the largest eigenvalue. Float32 roots err by about 1e-8 of the condition number, which it
        limits to ``1 / ridge``.

    Returns:
      Symmetric; not finite where A is not.

    Raises:
      ValueError: for an unknown method, or an exponent that it does not have.

    Source: eigenvalues as in Gupta et al. 2018 (arXiv 1802.09568); coupled Newton: Guo and Higham 2006, as in Anil et
      al. 2020 (arXiv 2002.09018); coupled polynomials: Higham 2008, chapter 6, with the coefficients of Amsel et al.
      2025 (arXiv 2505.16932).

    >>> print(matrix_power(jnp.diag(jnp.array([4.0, 1.0])), -0.5).round(3))
    [[0.5 0. ]
     [0.  1. ]]
    """
    check_exponent(exponent, method)
    if exponent == 0:
        return jnp.eye(A.shape[-1], dtype=A.dtype)
    # Powers of two in and out: the scale is exact, and neither it nor its power leaves the range of the dtype.
    X = unit_scale(A)
    largest = jnp.max(jnp.abs(A))
    scale = largest / jnp.where(largest > 0, jnp.max(jnp.abs(X)), 1)
    X = (X + X.mT) / 2
    if method == "eigh":
        root = _by_eigenvalues(X, exponent, ridge)
    elif method == "newton":
        root = _coupled_newton(X, round(-1 / exponent), ridge)
    else:
        root = _coupled_polynomial(X, halvings(exponent), ridge)
    zero = largest == 0
    root = jnp.where(zero, jnp.eye(A.shape[-1], dtype=A.dtype), root * jnp.where(zero, 1, scale) ** exponent)
    return (root + root.mT) / 2


def cholesky_inverse(A: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """``A⁻¹ = Xᵀ X``, ``X = L⁻¹``, of a positive definite ``A = L Lᵀ``, in float32 at least; NaN where that fails.

    A third of the work of `matrix_power`, and no eigenvalues: A must have been damped.

    >>> print(abs(cholesky_inverse(jnp.array([[2.0, 0.0], [0.0, 4.0]]))).round(3))
    [[0.5  0.  ]
     [0.   0.25]]
    """
    A = A.astype(jnp.promote_types(A.dtype, jnp.float32))
    if A.shape[-1] == 1:
        return 1 / A
    # In two rows of blocks, which spares half of the operations.
    P, Q, R = _inverse_factor_in_blocks(A)
    corner = times(Q.mT, R)
    return _blocks(times(P.mT, P) + times(Q.mT, Q), corner, corner.mT, times(R.mT, R))


def _inverse_factor(A: Array) -> Array:
    """``X = L⁻¹`` of ``A = L Lᵀ``."""
    if A.shape[-1] > LEAF:
        P, Q, R = _inverse_factor_in_blocks(A)
        return _blocks(P, jnp.zeros_like(Q.mT), Q, R)
    # The factor of [A I; I cI] is [L 0; L⁻ᵀ *], whatever c: one call, where LAPACK's triangular solves, and large
    # factorisations, take threads that go on to fight XLA's.
    eye = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)
    bordered = _blocks(A, eye, eye, jnp.finfo(A.dtype).max / 2 * eye)
    L = one_by_one(lambda A: jax.lax.linalg.cholesky(A, symmetrize_input=False))(bordered)
    return L[..., A.shape[-1] :, : A.shape[-1]].mT


def _inverse_factor_in_blocks(A: Array) -> tuple[Array, Array, Array]:
    """``P, Q, R`` of ``X = [P 0; Q R]``: R is the inverse factor of the Schur complement of the first block."""
    h = A.shape[-1] // 2
    P = _inverse_factor(A[..., :h, :h])
    B = times(A[..., h:, :h], P.mT)
    R = _inverse_factor(A[..., h:, h:] - times(B, B.mT))
    return P, -times(R, times(B, P)), R


def _blocks(A: Array, B: Array, C: Array, D: Array) -> Array:
    return jnp.concatenate([jnp.concatenate([A, B], -1), jnp.concatenate([C, D], -1)], -2)


def check_exponent(exponent: object, method: str) -> None:
    """A ValueError unless the method has the exponent."""
    if method not in METHODS:
        raise ValueError(f"method of a root must be one of {', '.join(map(repr, METHODS))}; got {method!r}.")
    if isinstance(exponent, bool) or not isinstance(exponent, int | float) or not -1 <= exponent <= 0:
        raise ValueError(f"exponent must be a number from -1 to 0; got {exponent!r}.")
    if not has_exponent(exponent, method):
        wanted = "-1/p for an integer p" if method == "newton" else "-1/2, -1/4, -1/8 or -1/16"
        raise ValueError(f"method {method!r} has exponents {wanted}; got {exponent!r}. Use 'eigh' for any.")


def has_exponent(exponent: float, method: str) -> bool:
    """Whether a method makes this power.

    >>> has_exponent(-0.25, "newton"), has_exponent(-0.3, "newton")
    (True, False)
    """
    if exponent == 0 or method == "eigh":
        return True
    p = -1 / exponent
    return abs(p - round(p)) <= 1e-9 and (method == "newton" or round(p) in (2, 4, 8, 16))


def halvings(exponent: float) -> int:
    """How often 1 is halved to give ``-exponent``."""
    return round(-1 / exponent).bit_length() - 1


def _by_eigenvalues(A: Array, exponent: float, ridge: ArrayLike) -> Array:
    def eigh(A: Array) -> Array:
        """Values on top of the vectors, in one array."""
        λ, Q = jnp.linalg.eigh(A, symmetrize_input=False)
        return jnp.concatenate([λ[None], Q])

    first = apart_last(A)[::-1]
    λ, Q = jnp.split(one_by_one(eigh)(A[first][:, first]), [1])
    Q = Q[jnp.argsort(first)]
    λ = jnp.maximum(λ[0], 0) + ridge * jnp.max(λ)
    return times(Q * (λ**exponent)[None], Q.mT)


def _coupled_newton(A: Array, p: int, ridge: ArrayLike) -> Array:
    """``X ← X M', M ← M'^p M, M' = ((p+1) I - M) / p`` from ``X = z^(1/p) I, M = z A``: M tends to I, X to the root."""
    eye = jnp.eye(A.shape[-1], dtype=A.dtype)
    A = A + ridge * _largest_eigenvalue(A) * eye
    z = (1 + p) / (2 * jnp.linalg.norm(A))

    def distance(M: Array) -> Array:
        return jnp.max(jnp.abs(M - eye))

    def goes_on(carry: tuple[Array, ...]) -> Array:
        i, _, _, error, before, _ = carry
        return (i < NEWTON_STEPS) & (error > 1e-6) & (error < 1.2 * before)

    def step(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        i, X, M, error, _, best = carry
        change = ((p + 1) * eye - M) / p
        X_new, M_new = times(X, change), times(_power(change, p), M)
        new_error = distance(M_new)
        best = jnp.where(new_error < error, X_new, best)
        return i + 1, X_new, M_new, new_error, error, best

    X, M = z ** (1 / p) * eye, z * A
    start = (jnp.zeros([], jnp.int32), X, M, distance(M), jnp.asarray(jnp.inf, A.dtype), X)
    return jax.lax.while_loop(goes_on, step, start)[-1]


def _coupled_polynomial(A: Array, halvings: int, ridge: ArrayLike) -> Array:
    """``P = Z Y; H = a I + b P + c P²; Y ← Y H, Z ← H Z`` from ``Y = A / c, Z = I``: Y tends to ``(A/c)^1/2``, Z to
    ``(A/c)^-1/2``; again on Y for the next root.
    """
    eye = jnp.eye(A.shape[-1], dtype=A.dtype)
    bound = 1.01 * _largest_eigenvalue(A)
    Y = (A + ridge * bound * eye) / (bound * (1 + ridge))
    coefficients = jnp.asarray(polar_express(POLYNOMIAL_STEPS), A.dtype)

    def step(carry: tuple[Array, Array], h: Array) -> tuple[tuple[Array, Array], None]:
        (Y, Z), (a, b, c) = carry, h
        P = times(Z, Y)
        H = a * eye + b * P + c * times(P, P)
        Y, Z = times(Y, H), times(H, Z)
        return ((Y + Y.mT) / 2, (Z + Z.mT) / 2), None

    Z = eye
    for _ in range(halvings):
        (Y, Z), _ = jax.lax.scan(step, (Y, eye), coefficients)
    return Z * (bound * (1 + ridge)) ** (-(0.5**halvings))


def _largest_eigenvalue(A: Array) -> Array:
    """A bound on the largest eigenvalue of a positive semi-definite matrix: the smaller one of the mean plus sqrt(d-1)
    standard deviations (Wolkowicz and Styan 1980) and the largest row sum.
    """
    d = A.shape[-1]
    mean = jnp.trace(A) / d
    spread = jnp.sqrt(jnp.maximum(jnp.sum(A * A) / d - mean**2, 0) * (d - 1))
    return jnp.minimum(mean + spread, jnp.max(jnp.sum(jnp.abs(A), -1)))


def _power(A: Array, p: int) -> Array:
    """``A^p`` by squaring."""
    if p == 1:
        return A
    half = _power(times(A, A), p // 2)
    return times(half, A) if p % 2 else half
