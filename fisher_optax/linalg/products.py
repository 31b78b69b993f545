"""The products of a Newton-Schulz iteration: of a wide or tall X, and of symmetric matrices that commute.

Everything an iteration multiplies on the small side is a polynomial of one matrix ``X Xᵀ``, so every product is
symmetric again, and of four blocks three are enough:

    [A  B] [P  Q]   [A P + B Qᵀ   A Q + B R]
    [Bᵀ C] [Qᵀ R] = [     ·       Bᵀ Q + C R]      6 block products of 8
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# From which size on three quarters of the flops, in products of half the size, take less time. Seen on two cores: at
# 256 they do not, at 384 they do. Not measured elsewhere, so not done there.
HALVED_FROM = {"cpu": 384}

# A symmetric matrix: whole, or its blocks (A, B, C).
Symmetric = tuple[Float[Array, "..."], ...]


def is_halved(n: int) -> bool:
    """Whether `Products` computes symmetric n x n matrices in blocks here."""
    return n >= HALVED_FROM.get(jax.default_backend(), n + 1)


def product_flops(n: int, halved: bool = False) -> int:
    """Flops of a product of symmetric n x n matrices.

    >>> product_flops(2), product_flops(2, halved=True)
    (16, 12)
    """
    k, l = n // 2, n - n // 2
    return 2 * (k**3 + 2 * k * k * l + 2 * k * l * l + l**3) if halved else 2 * n**3


@dataclasses.dataclass(frozen=True)
class Products:
    """Products with a wide X as the papers write them; a tall X stands for its transpose, without forming it."""

    tall: bool
    halved: bool
    dtype: Any
    precision: Any

    def outer(self, X: Array) -> Symmetric:
        """``X Xᵀ``."""
        axis = X.ndim - 2 if self.tall else X.ndim - 1
        R = self._dot(X, X, axis, axis)
        k = R.shape[-1] // 2
        return (R[..., :k, :k], R[..., :k, k:], R[..., k:, k:]) if self.halved else (R,)

    def product(self, S: Symmetric, T: Symmetric) -> Symmetric:
        """``S T`` of two that commute."""
        if not self.halved:
            return (self._matmul(S[0], T[0]),)
        (A, B, C), (P, Q, R) = S, T
        last = A.ndim - 1
        return (
            self._matmul(A, P) + self._dot(B, Q, last, last),
            self._matmul(A, Q) + self._matmul(B, R),
            self._dot(B, Q, last - 1, last - 1) + self._matmul(C, R),
        )

    def apply(self, S: Symmetric, X: Array) -> Array:
        """``S X``."""
        return self._matmul(X, whole(S)) if self.tall else self._matmul(whole(S), X)

    def _matmul(self, A: Array, B: Array) -> Array:
        return self._dot(A, B, A.ndim - 1, B.ndim - 2)

    def _dot(self, A: Array, B: Array, i: int, j: int) -> Array:
        """The sum over axis i of A and j of B; operands rounded to ``dtype``, sums in float32 at least."""
        batch = tuple(range(A.ndim - 2))
        out = jax.lax.dot_general(
            A.astype(self.dtype),
            B.astype(self.dtype),
            (((i,), (j,)), (batch, batch)),
            precision=self.precision,
            preferred_element_type=jnp.promote_types(self.dtype, jnp.float32),
        )
        return out.astype(jnp.promote_types(A.dtype, jnp.float32))


def whole(S: Symmetric) -> Array:
    """All of it as one matrix."""
    if len(S) == 1:
        return S[0]
    A, B, C = S
    return jnp.concatenate([jnp.concatenate([A, B], -1), jnp.concatenate([B.mT, C], -1)], -2)


def combine(a: Any, S: Symmetric, b: Any, T: Symmetric) -> Symmetric:
    """``a S + b T``."""
    return tuple(a * s + b * t for s, t in zip(S, T, strict=True))


def add_identity(a: Any, S: Symmetric) -> Symmetric:
    """``a I + S``."""
    return tuple(s + a * jnp.eye(s.shape[-1], dtype=s.dtype) if i != 1 else s for i, s in enumerate(S))


def trace(S: Symmetric) -> Float[Array, "*batch"]:
    """The sum of the diagonal."""
    return sum((jnp.trace(s, axis1=-2, axis2=-1) for s in S[2::2]), jnp.trace(S[0], axis1=-2, axis2=-1))
