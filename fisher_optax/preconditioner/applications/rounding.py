"""Where a rotated gradient is the rounding of its rotation, and nothing to divide by.

Gradients that span less than the matrix have entries of ``Q_Lᵀ G Q_R`` that should be zero. In floating point they are
some units of rounding ε times the norms of their row and column of the gradient: by the two products 1 to 3, and by
the basis ``ε κ``, where the singular values that the gradients do have span κ, since a product of a matrix with itself
shows an eigenvector of theirs no better; over a side of length d that is spread out, to ``ε κ / √d`` an entry. Adam
divides by a root second moment, and makes steps of them as long as any, unless its ``eps`` is larger; but that is in
units of the gradient, which nobody knows. So there is a floor relative to the gradient itself, and entries below it get
no step. One of second moment v, in an m x n matrix, counts where

    v > ε² [u(n)² Σ_row v + u(m)² Σ_column v + u(d)² Σ v / d],   u(d)² = 16² + 256² min(1, 8/d),   d = max(m, n)

The others are as without it, at any scale. In float32 that is 3e-5 of the norms in a small matrix, and 3e-6 in one of
side 1000, where it comes to a ten-thousandth of an entry like the others.

Factors that start at the identity hold little of the first gradients, and show their eigenvectors worse: those of two
eigenvalues by ``ε λ_max`` over the distance of the two. A direction whose eigenvalue nothing has raised shares it with
others. In a basis that has eigenvalues, entries of such a one count only from ``256 ε λ_max / (λ_i - λ_min)`` of the
other directions i on, or a thousandth where that is less: those of which a factor has seen enough hold back no more
than they do in any basis.

At the first step v is of one gradient, and its basis perhaps of the same. Then all but the diagonal should be zero, for
any κ: the product keeps singular values down to √ε of the largest, and leaves up to √ε elsewhere. So the last term is
``ε Σ v / max(m, n)`` there, and what does not count is left out of the moments.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

PRODUCTS, BASES = 16, 256  # units of rounding
SAME = 16  # eigenvalues that many units of the largest apart are one
SHOWS = 1e-3  # the most that a direction holds back others for being shown badly

Values = tuple[Float[Array, " m"] | None, Float[Array, " n"] | None]


def counts(v: Float[Array, "m n"], first: bool = False, values: Values = (None, None)) -> Bool[Array, "m n"]:
    """Which entries are more than rounding (see the top of this file), from the second moments of all.

    Args:
      v: of a matrix in its basis, of any scale.
      first: whether v is of the first gradient.
      values: the eigenvalues of the left and of the right basis, where they are known.

    >>> print(counts(jnp.array([[1.0, 1e-4], [1e-14, 0.0]])))
    [[ True  True]
     [False False]]
    """
    (m, n), d, ε = v.shape, max(v.shape), float(jnp.finfo(v.dtype).eps)
    # Means, since sums of squares overflow.
    rows, columns = jnp.sum(v * (1 / n), 1, keepdims=True), jnp.sum(v * (1 / m), 0, keepdims=True)
    least = n * _floor(n, ε) * rows + m * _floor(m, ε) * columns
    least = least + (ε if first else _floor(d, ε)) * min(m, n) * jnp.sum(v * (1 / (m * n)))
    for axis, λ in enumerate(values):
        if λ is not None:
            leaks = jnp.sum(jnp.expand_dims(jnp.square(_shown(λ)), 1 - axis) * v, axis, keepdims=True)
            least = least + jnp.where(jnp.expand_dims(_unraised(λ), 1 - axis), leaks, 0)
    return v > least


def _floor(d: int, ε: float) -> float:
    """Of the sum of squares along a side of length d, the part that is rounding."""
    return (PRODUCTS**2 + BASES**2 * min(1, 8 / d)) * ε**2


def ratio(m: Array, root: Array) -> Array:
    """``m / root``, and m where the root is zero: of entries without a gradient, where no eps is added.

    >>> print(ratio(jnp.array([0.0, 1.0]), jnp.array([0.0, 2.0])))
    [0.  0.5]
    """
    return m / jnp.where(root > 0, root, 1)


def _shown(λ: Float[Array, " d"]) -> Float[Array, " d"]:
    """To what part of each direction its eigenvalue tells it from those of the smallest one."""
    least = BASES * jnp.finfo(λ.dtype).eps * jnp.max(λ)
    gap = λ - jnp.min(λ)
    return jnp.where(gap * SHOWS > least, least / jnp.where(gap > 0, gap, 1), SHOWS)


def _unraised(λ: Float[Array, " d"]) -> Bool[Array, " d"]:
    """Which of them are the smallest, if that is more than one."""
    lowest = λ - jnp.min(λ) <= SAME * jnp.finfo(λ.dtype).eps * jnp.max(λ)
    return lowest & (jnp.sum(lowest) > 1)
