"""Lanczos' iteration on an operator: matfree's, kept going where the Krylov space ends.

After r + 1 products with a matrix of rank r, or one with the identity, there is no new direction left, and the next
step would be 0/0. So the product is ``B v = A v / s + ε N v``, with s the size of A, N a random cyclic tridiagonal
matrix and ε some units of rounding. Past the end of A's own Krylov space the iteration then goes on in a fresh
direction, orthogonal to all before. ``Q A Qᵀ = s (T - ε Q N Qᵀ)`` takes N out of the eigenvalues again.

Two passes of orthogonalisation, which are matfree's, keep that up while there is room: measured on the identity, the
worst case, up to m = D / 2. For more, D products give the matrix itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PRNGKeyArray
from matfree.decomp import tridiag_sym

from ..operators.operator import Operator

# ε, in units of rounding.
SHAKE = 64


def product(operator: Operator, v: Array) -> Array:
    """With a vector, at the full precision of its dtype."""
    with jax.default_matmul_precision("highest"):
        return operator.ravel(operator @ operator.unravel(v)).astype(v.dtype)


def dtype_of(operator: Operator) -> np.dtype:
    """What the work is done in."""
    return jnp.promote_types(operator.dtype, jnp.float32)


@jax.jit
def _probe(operator: Operator, key: PRNGKeyArray) -> tuple[Array, Array]:
    """The largest entry of A u and A v, and ``|uᵀAv - vᵀAu| / (|Au| + |Av|)``, for u and v normal."""
    u, v = jax.random.normal(key, (2, operator.size), dtype_of(operator))
    AuAv = jnp.stack([product(operator, u), product(operator, v)])
    s = jnp.max(jnp.abs(AuAv))
    Au, Av = AuAv / jnp.where(s == 0, 1, s)  # squares of small numbers would be 0
    asymmetry = jnp.abs(jnp.sum(u * Av - v * Au))
    return s, asymmetry / (jnp.linalg.norm(Au) + jnp.linalg.norm(Av) + jnp.finfo(s.dtype).tiny)


def checked_size(operator: Operator, key: PRNGKeyArray, tolerance: float | None) -> Array:
    """The size of A, once it is known to be finite and symmetric."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((operator, key))):
        raise ValueError(f"{operator.name}: its spectrum is looked at outside jit: the work is jitted in here.")
    s, asymmetry = _probe(operator, key)
    require_finite(operator, s)
    coarsest = max(float(jnp.finfo(leaf.dtype).eps) for leaf in operator.leaves)
    allowed = coarsest**0.5 if tolerance is None else tolerance
    if asymmetry > allowed:
        raise ValueError(
            f"{operator.name} is not symmetric: uᵀAv and vᵀAu of a random pair differ by {asymmetry:.1e}, relative to "
            f"|Au| + |Av|; at most {allowed:.1e} is rounding. Mend its product, or raise `tolerance` where it is noisy."
        )
    return s


def require_finite(operator: Operator, x: Array) -> None:
    """An error where products were not."""
    if not jnp.all(jnp.isfinite(x)):
        raise ValueError(f"{operator.name}: its product with a finite vector is not finite. Look for NaN in its data.")


def lanczos(operator: Operator, s: Array, key: PRNGKeyArray, start: Array, m: int) -> tuple[Array, Array, Array]:
    """Ritz values θ (ascending), their vectors as rows, and the shares of ``start`` in each; all D if m > D / 2."""
    g, scale = jax.random.uniform(key, start.shape, start.dtype, -1, 1), jnp.where(s == 0, 1, s)
    N = lambda v: g * jnp.roll(v, -1, -1) + jnp.roll(g * v, 1, -1)  # noqa: E731
    A = lambda v: product(operator, v) / scale  # noqa: E731
    ε = SHAKE * jnp.finfo(start.dtype).eps
    with jax.default_matmul_precision("highest"):
        if 2 * m > operator.size:
            QAQ, Q = jax.lax.map(A, jnp.eye(operator.size, dtype=start.dtype)), None
        else:
            found = tridiag_sym(m, custom_vjp=False)(lambda v: A(v) + ε * N(v), start)
            Q, T = jnp.asarray(found.Q_tall), jnp.asarray(found.J_small)
            QAQ = T - ε * Q @ N(Q).T
        θ, U = jnp.linalg.eigh((QAQ + QAQ.T) / 2)
        if Q is None:
            return s * θ, U.T, jnp.square(start @ U) / jnp.sum(jnp.square(start))
        return s * θ, U.T @ Q, jnp.square(U[0])
