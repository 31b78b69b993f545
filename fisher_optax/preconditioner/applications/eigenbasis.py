"""Run any Optax transformation in the eigenbasis of the factors: ``U = Q_L f(Q_Lᵀ G Q_R) Q_Rᵀ``.

The inner state stays in the basis. When the basis turns, moments must turn with it, or they speak of directions that
are gone: fields named in ``linear`` are rotated like a gradient, fields named in ``quadratic`` are carried like its
square. A direction that gradients never had gets no step: what an inner transformation makes of rounding is left out
(`counts`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from ... import linalg
from ..._arguments import one_of, value_at
from ..contracts import PRECISIONS, Application, Eigenbasis, Eigenpairs, Moments

Matrix = Float[Array, "m n"]


def in_eigenbasis(
    inner: optax.GradientTransformation,
    *,
    linear: tuple[str, ...] = ("mu", "trace"),
    quadratic: tuple[str, ...] = ("nu",),
    left: tuple[str, ...] = ("nu_left",),
    right: tuple[str, ...] = ("nu_right",),
    precision: str = "highest",
) -> Application:
    """Apply ``inner`` to the rotated gradient and rotate its result back.

    Args:
      inner: any transformation, e.g. `adam`, ``optax.scale_by_lion()``, ``optax.trace(0.9)``; it sees one matrix at a
        time, and no ``params``.
      linear: names of the fields of its state that hold averages of gradients (default: Optax's names).
      quadratic: names of the fields that hold averages of squared gradients.
      left, right: names of the fields that hold a vector along a side, averaged over the squares of the other.
      precision: of the rotations, as in `fo.Products`.

    Entries whose second moment (that of ``quadratic``, or of ``left`` and ``right``; else the square of ``linear``, or
    of the gradient) is rounding, relative to its row and column, get no step.

    Raises:
      ValueError: for an unknown precision.

    Example:
      >>> import optax, fisher_optax as fo
      >>> lion = fo.in_eigenbasis(optax.scale_by_lion())
      >>> tx = fo.precondition(fo.factors.outer_product(0.95), fo.decompositions.orthogonal_iteration(), lion)
    """
    one_of("precision", precision, PRECISIONS)
    transform: Any = optax.with_extra_args_support(inner)

    def update(G: Matrix, state: PyTree, basis: Eigenbasis | Eigenpairs, **extra: PyTree) -> tuple[Matrix, PyTree]:
        if basis.left is None and basis.right is None:
            return transform.update(G, state, None, **extra)
        H = linalg.into_basis(basis.left, G, basis.right, precision)
        H = jnp.where(~_is_first(state) | counts(jnp.square(H), first=True), H, 0)
        X, state = transform.update(H, state, None, **extra)
        values = (basis.left_values, basis.right_values) if isinstance(basis, Eigenpairs) else (None, None)
        X = jnp.where(counts(second_moment(state, H), values=values), X, 0)
        return linalg.out_of_basis(basis.left, X, basis.right, precision), state

    def second_moment(state: PyTree, H: Matrix) -> Matrix:
        """Of each entry, as the inner state has it; else the square of its mean, or of this gradient."""
        sides = [*_fields(state, left), *_fields(state, right)]
        if len(sides) == 2:
            return jnp.outer(*sides)
        squares = [*_fields(state, quadratic), *(jnp.square(m.astype(H.dtype)) for m in _fields(state, linear))]
        return next((v for v in squares if v.shape == H.shape), jnp.square(H))

    def moments(state: PyTree) -> Moments:
        return Moments(*(tuple(_fields(state, names)) for names in (linear, quadratic, left, right)))

    def with_moments(state: PyTree, moments: Moments) -> PyTree:
        for names, values in zip((linear, quadratic, left, right), moments, strict=True):
            state = _replace(state, names, iter(values))
        return state

    accepts = (Eigenbasis, Eigenpairs)
    return Application("in eigenbasis", accepts, inner.init, update, moments, with_moments, precision=precision)


class AdamState(NamedTuple):
    """State of `adam`, in the basis."""

    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree


def adam(
    b1: optax.ScalarOrSchedule = 0.95,
    b2: optax.ScalarOrSchedule = 0.95,
    eps: optax.ScalarOrSchedule = 1e-8,
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
    normalize: bool = False,
) -> optax.GradientTransformation:
    """Adam as the SOAP authors run it: ``eps`` is added before the bias is corrected.

        m ← b1 m + (1-b1) g;   v ← b2 v + (1-b2) g²;   u = sqrt(1-b2ᵗ) / (1-b1ᵗ) · m / (sqrt(v) + eps)

    Args:
      b1, b2: decay rates, numbers or schedules of the step.
      eps: number or schedule, in units of the gradient; small, since it is compared with an average that still carries
        its bias. Where this runs in a basis, rounding is kept out by a floor relative to the gradient, and not by eps.
      bias_correction: whether the factor in front is applied.
      mu_dtype: storage of m; the gradient's by default.
      normalize: scale ``m / (sqrt(v) + eps)`` to root mean square 1 before the correction; zero stays zero.
    """

    def init(params: PyTree) -> AdamState:
        mu = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=mu_dtype), params)
        return AdamState(jnp.zeros([], jnp.int32), mu, jax.tree.map(jnp.zeros_like, params))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, AdamState]:
        del params
        t = state.count + 1
        β1, β2, ε = (value_at(value, state.count) for value in (b1, b2, eps))
        mu = jax.tree.map(lambda g, m: β1 * m.astype(g.dtype) + (1 - β1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: β2 * v + (1 - β2) * jnp.square(g), updates, state.nu)
        scale = jnp.sqrt(1 - β2**t) / (1 - β1**t) if bias_correction else 1.0
        u = jax.tree.map(lambda m, v: ratio(m, jnp.sqrt(v) + ε), mu, nu)
        if normalize:
            u = jax.tree.map(lambda x: x / (jnp.sqrt(jnp.mean(jnp.square(x))) + 1e-30), u)
        u = jax.tree.map(lambda x, v: (scale * x).astype(v.dtype), u, nu)
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
        nu = jax.tree.map(lambda v, old: v.astype(old.dtype), nu, state.nu)
        return u, AdamState(t, mu, nu)

    return optax.GradientTransformation(init, update)


def _is_first(state: PyTree) -> Array:
    """Whether the state has seen no gradient, where it counts them."""
    return next((count == 0 for count in _fields(state, ("count",))), jnp.zeros([], bool))


def _is_state(node: object) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _fields(state: PyTree, names: tuple[str, ...]) -> Iterator[PyTree]:
    """The fields of nested NamedTuple states that bear one of the names, in order."""
    if _is_state(state):
        for name in state._fields:
            yield from [getattr(state, name)] if name in names else _fields(getattr(state, name), names)
    elif isinstance(state, tuple | list):
        for part in state:
            yield from _fields(part, names)


def _replace(state: PyTree, names: tuple[str, ...], values: Iterator[PyTree]) -> PyTree:
    """The state with those fields replaced by the next of ``values``."""
    if _is_state(state):
        return type(state)(
            *(
                next(values) if name in names else _replace(getattr(state, name), names, values)
                for name in state._fields
            )
        )
    if isinstance(state, tuple | list):
        return type(state)(_replace(part, names, values) for part in state)
    return state


# Where a rotated gradient is the rounding of its rotation, and nothing to divide by.
#
# Gradients that span less than the matrix have entries of ``Q_Lᵀ G Q_R`` that should be zero. In floating point they
# are some units of rounding ε times the norms of their row and column of the gradient: by the two products 1 to 3, and
# by the basis ``ε κ``, where the singular values that the gradients do have span κ, since a product of a matrix with
# itself shows an eigenvector of theirs no better; over a side of length d that is spread out, to ``ε κ / √d`` an entry.
# Adam divides by a root second moment, and makes steps of them as long as any, unless its ``eps`` is larger; but that
# is in units of the gradient, which nobody knows. So there is a floor relative to the gradient itself, and entries
# below it get no step. One of second moment v, in an m x n matrix, counts where
#
#     v > ε² [u(n)² Σ_row v + u(m)² Σ_column v + u(d)² Σ v / d],   u(d)² = 16² + 256² min(1, 8/d),   d = max(m, n)
#
# The others are as without it, at any scale. In float32 that is 3e-5 of the norms in a small matrix, and 3e-6 in one of
# side 1000, where it comes to a ten-thousandth of an entry like the others.
#
# Factors that start at the identity hold little of the first gradients, and show their eigenvectors worse: those of two
# eigenvalues by ``ε λ_max`` over the distance of the two. A direction whose eigenvalue nothing has raised shares it
# with others. In a basis that has eigenvalues, entries of such a one count only from ``256 ε λ_max / (λ_i - λ_min)`` of
# the other directions i on, or a thousandth where that is less: those of which a factor has seen enough hold back no
# more than they do in any basis.
#
# At the first step v is of one gradient, and its basis perhaps of the same. Then all but the diagonal should be zero,
# for any κ: the product keeps singular values down to √ε of the largest, and leaves up to √ε elsewhere. So the last
# term is ``ε Σ v / max(m, n)`` there, and what does not count is left out of the moments.


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
