"""Scaling that is safe over the whole range of a floating-point type."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact


def unit_scale(X: Inexact[Array, "*batch m n"]) -> Inexact[Array, "*batch m n"]:
    """Each matrix times the power of two that brings its largest entry into [2, 4): exact, for every scale. Real and
    imaginary parts count as entries.

    Subnormal numbers are scaled as the smallest normal one would be: where there are no others, the largest entry
    comes to lie in [2e-7, 2).

    Dividing by the largest entry is not: compilers multiply by its reciprocal, which underflows for entries near the
    top of the range, and processors read entries at the bottom (subnormal numbers) as zero. So the exponent is read
    from the bits, and a subnormal entry converted from its digits.

    Args:
      X: of 32 or 64 bits a part. Zero stays zero; a matrix with an infinity or a NaN gets a NaN.

    >>> print(unit_scale(jnp.array([[0.75, -0.125]])))
    [[ 3.  -0.5]]
    """
    if jnp.iscomplexobj(X):
        return _by_parts(unit_scale, X)
    info = jnp.finfo(X.dtype)
    integer = jnp.int32 if info.bits == 32 else jnp.int64
    bias, digits = info.maxexp - 1, info.nmant

    def power(biased: Array) -> Array:
        """``2**(biased - bias)``, zero for ``biased = 0``."""
        return jax.lax.bitcast_convert_type(biased << digits, X.dtype)

    bits = jax.lax.bitcast_convert_type(X, integer)
    magnitude = bits & jnp.iinfo(integer).max
    # A maximum may read subnormal numbers as zero and pass over a NaN, which stays one in its place.
    largest = jnp.max(jnp.abs(X), axis=(-2, -1), keepdims=True, initial=0)
    exponent = jnp.maximum(jax.lax.bitcast_convert_type(largest, integer) >> digits, 1)
    subnormal = jnp.where(bits < 0, -magnitude, magnitude).astype(X.dtype)
    return jnp.where(
        magnitude < 1 << digits,
        subnormal * power(jnp.maximum(bias + 2 - digits - exponent, 0)),
        X * power(2 * bias + 1 - exponent),
    )


def unit_frobenius(X: Inexact[Array, "*batch m n"]) -> Inexact[Array, "*batch m n"]:
    """Each matrix divided by its Frobenius norm; zero stays zero, no epsilon, any scale.

    Args:
      X: of 32 or 64 bits a part.

    >>> print(unit_frobenius(jnp.array([[3e38, 0.0], [0.0, 0.0]])))
    [[1. 0.]
     [0. 0.]]
    """
    if jnp.iscomplexobj(X):
        return _by_parts(unit_frobenius, X)
    X = unit_scale(X)
    return X * inverse_root(jnp.sum(X * X, axis=(-2, -1), keepdims=True))


def inverse_root(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``x^(-1/2)``, zero for zero.

    >>> print(inverse_root(jnp.array([4.0, 0.0])))
    [0.5 0. ]
    """
    return jnp.where(x == 0, 0, jax.lax.rsqrt(x))


def _by_parts(f: Callable[[Array], Array], X: Complex[Array, "*batch m n"]) -> Complex[Array, "*batch m n"]:
    """``f`` of the real ``[Re X, Im X]``, put together again."""
    return jax.lax.complex(*jnp.split(f(jnp.concatenate([X.real, X.imag], -1)), 2, -1))
