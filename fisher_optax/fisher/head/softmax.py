"""The Fisher of the logits of a softmax layer, averaged over tokens.

With p_t the probabilities of token t, shares ``s_t = w_t / Σ w`` of the weights, and means ``p̄ = Σ_t s_t p_t``,

    G = Σ_t s_t (diag(p_t) - p_t p_tᵀ) = diag(p̄) - p̄ p̄ᵀ - Cᵀ C,    row t of C being sqrt(s_t) (p_t - p̄).

``G 1 = 0``, and rows of C sum to 0. `head_solve` says how ``G + λ`` is solved.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from ...linalg.blocks import exact_sum, frequent_directions
from . import solve as head_solve
from .solve import (
    check_counted,
    check_sketch,
    check_vocabularies,
    columns,
    complement,
    damping_of,
    matmul,
    probabilities,
    shares,
    tokens_and_weights,
)

# Of signed rows: from here on float32 leaves two digits of a solution or fewer.
TRUSTED = 1e4


class HeadSolution(NamedTuple):
    """A solution, the condition number of S, and whether the solution is finite and does not depend on that, or depends
    on one below 1e4.
    """

    solution: Array
    condition: Float[Array, ""]
    trusted: Bool[Array, ""]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("mean", "rows", "weights", "total"), meta_fields=("tokens",)
)
@dataclasses.dataclass(frozen=True)
class SoftmaxHead:
    """``G = Σ_t s_t (diag(p_t) - p_t p_tᵀ)``, V x V, from the logits that a forward pass has already.

    Made by `from_logits` or `from_batches`; a pytree, so it may be made in one jitted function and used in another.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisher_optax.fisher.head.softmax import SoftmaxHead
      >>> head = SoftmaxHead.from_logits(jnp.zeros((5, 2)))
      >>> print(head.dense())
      [[ 0.25 -0.25]
       [-0.25  0.25]]
      >>> print(head.solve(jnp.array([1.0, -1.0]), damping=1e-9, zero_sum=True))
      [ 2. -2.]
    """

    # Arrays, or what JAX puts in their places.
    mean: PyTree  # (V,): p̄
    rows: PyTree  # (r, V): p_t, or C
    weights: PyTree  # (r,): w_t; None for C
    total: PyTree  # (): Σ w
    tokens: bool  # the rows are single tokens, in their order

    @classmethod
    def from_logits(cls, logits: ArrayLike, weights: ArrayLike | None = None) -> "SoftmaxHead":
        """Of tokens, in float32 at least.

        Args:
          logits: ``(*positions, V)``; -inf for a word that cannot occur. A token with a NaN or +inf counts for nothing.
          weights: ``(*positions,)``, >= 0; 0 leaves a token out. None: all count alike.

        Raises:
          ValueError: where shapes do not fit, a weight is negative, or no token counts. Under `jax.jit` a negative
            weight is 0, and a head of no tokens is 0.
        """
        head = _of_rows(*probabilities(*tokens_and_weights("SoftmaxHead", "logits", logits, weights)))
        check_counted("SoftmaxHead", head.total)
        return head

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[ArrayLike | tuple[ArrayLike, ArrayLike]],
        max_rows: int | None = None,
        sketch: str = "subsample",
    ) -> "SoftmaxHead":
        """Of logits, or tuples of logits and weights, batch after batch, by `merge`: in the memory of one batch and
        ``max_rows + 1`` rows.
        """
        head = None
        for batch in batches:
            new = cls.from_logits(*batch) if isinstance(batch, tuple) else cls.from_logits(batch)
            head = new.compress(max_rows, sketch) if head is None else head.merge(new, max_rows, sketch)
        if head is None:
            raise ValueError("SoftmaxHead.from_batches: got no batch; wanted at least one.")
        return head

    def merge(self, other: "SoftmaxHead", max_rows: int | None = None, sketch: str = "subsample") -> "SoftmaxHead":
        """The head of the tokens of both, weighted by their totals; exact, but for `compress` to ``max_rows``.

        Tokens are put together. Signed rows are scaled by the roots of the shares a and b of the totals, and get one
        more, ``sqrt(a b) (p̄_a - p̄_b)``, for the difference of the means (Chan, Golub and LeVeque 1983).

        Raises:
          ValueError: for another vocabulary, and as `compress`.
        """
        check_vocabularies("SoftmaxHead", len(self.mean), len(other.mean))
        return _merged(self, other).compress(max_rows, sketch)

    def compress(self, max_rows: int | None, sketch: str = "subsample") -> "SoftmaxHead":
        """At most ``max_rows`` rows. G only grows by it, keeps p̄ and ``G 1 = 0``, and stays positive semi-definite.

        Args:
          max_rows: None, or not fewer than there are, changes nothing.
          sketch: "subsample" keeps the tokens of the largest ``s |p - p̄|²`` and makes one of the others, of their mean,
            which adds their covariance to G, least where they lie close. What remains are probabilities, so `solve` is
            as exact as before; signed rows are dropped instead. "frequent_directions" (Liberty 2013) keeps signed rows
            along the largest singular values σ of C, shrunk to ``sqrt(σ² - σ₀²)``, σ₀ the first left out: G grows by
            σ₀² at most in any direction, little where tokens differ in few, and `solve` depends on `condition`.

        Raises:
          ValueError: for an unknown sketch, or a ``max_rows`` that is no count.
        """
        check_sketch("SoftmaxHead", max_rows, sketch)
        if max_rows is None or len(self.rows) <= max_rows:
            return self
        return _compressed(self, max_rows, sketch)

    def matvec(self, Y: ArrayLike) -> Array:
        """``G Y`` for Y of ``(V, features)`` or ``(V,)``; errs by rounding of ``p̄ Y``.

        Raises:
          ValueError: for another shape.
        """
        return columns("SoftmaxHead.matvec", Y, self.rows, lambda Y: _product(self, Y))

    def dense(self) -> Float[Array, "V V"]:
        """All V² entries."""
        return self.matvec(jnp.eye(len(self.mean), dtype=self.mean.dtype))

    def solve(self, Y: ArrayLike, damping: ArrayLike, zero_sum: bool = False) -> Array:
        """``(G + λ)⁻¹ Y``, to about 1e-6 in float32 for all λ and all logits.

        Signed rows (see `compress`) err by up to 1e-6 of `condition`; there eigenvalues of S count as sqrt(r) times
        the rounding unit at least, so that the solution is finite, and positive definite in Y, however singular S is.

        Args:
          Y: ``(V, features)`` or ``(V,)``.
          damping: λ > 0, in units of probability: p̄ is 1/V in the mean.
          zero_sum: the columns of Y sum to 0, as gradients of cross-entropy do. What rounding has made of that sum, and
            1/λ would blow up, is dropped. Not so by default: gradients of a z-loss or of decay have another sum.

        Raises:
          ValueError: where Y does not fit, or damping is not above 0 (under `jax.jit` the least number above 0 then).

        Source: Alfa, Xue and Ye 2002 (elimination); for signed rows, Woodbury's identity.
        """
        λ = damping_of("SoftmaxHead.solve", damping, self.mean.dtype)
        return columns("SoftmaxHead.solve", Y, self.rows, lambda Y: _solution(self, Y, λ, zero_sum))

    def solve_with_info(self, Y: ArrayLike, damping: ArrayLike, zero_sum: bool = False) -> HeadSolution:
        """`solve`, with what is known of the solution: `condition`, for about the cost of a second solve."""
        x, condition = self.solve(Y, damping, zero_sum), self.condition(damping)
        depends = jnp.asarray(self.weights is None)
        return HeadSolution(x, condition, jnp.all(jnp.isfinite(x)) & (~depends | (condition <= TRUSTED)))

    def condition(self, damping: ArrayLike) -> Float[Array, ""]:
        """Condition number of S: how near G is to null vectors besides 1. From 1 for tokens that agree to ``p̄ / λ`` for
        tokens each certain of a word, or whose words are apart; told up to 1 / (sqrt(r) eps).
        """
        return _condition(self, damping_of("SoftmaxHead.condition", damping, self.mean.dtype))

    def diagonal(self, hidden: ArrayLike) -> Float[Array, "V features"]:
        """Diagonal of the Fisher of a kernel whose logits are ``hidden @ kernel``: ``Σ_t s_t p_t (1 - p_t) h_t²``.

        Args:
          hidden: ``(*positions, features)``, of the tokens that the head was made of, in their order.

        Raises:
          ValueError: where there are not as many, or the rows are no longer tokens.
        """
        h = self._hidden(hidden)
        return matmul(_variances(self).T, h * h)

    def row_scores(self, hidden: ArrayLike) -> Float[Array, " V"]:
        """`diagonal` summed over features, ``E[p (1 - p) |h|²]``: what a word's row of the kernel is worth."""
        h = self._hidden(hidden)
        return exact_sum(_variances(self) * jnp.sum(h * h, -1, keepdims=True), 0)

    def _hidden(self, hidden: ArrayLike) -> Array:
        if not self.tokens:
            raise ValueError("SoftmaxHead: compressed rows are no tokens. Take the diagonal of each batch's own head.")
        h = jnp.asarray(hidden)
        if h.ndim < 1 or h.size != len(self.rows) * h.shape[-1]:
            wanted = f"(*positions, features) of {len(self.rows)} tokens"
            raise ValueError(f"SoftmaxHead: got hidden of shape {h.shape}; wanted {wanted}.")
        h = h.reshape(len(self.rows), -1).astype(jnp.promote_types(h.dtype, self.mean.dtype))
        return jnp.where(_shares(self)[:, None] > 0, h, 0)


@functools.partial(jax.jit, static_argnums=2)
def _of_rows(p: Array, w: Array, tokens: bool = True) -> SoftmaxHead:
    return SoftmaxHead(exact_sum(shares(w)[:, None] * p, 0), p, w, jnp.sum(w), tokens)


def _shares(head: SoftmaxHead) -> Array:
    return jnp.ones(len(head.rows), head.rows.dtype) if head.weights is None else shares(head.weights)


def _centred(head: SoftmaxHead) -> Array:
    """C, r x V."""
    return head.rows if head.weights is None else jnp.sqrt(_shares(head))[:, None] * (head.rows - head.mean)


@jax.jit
def _merged(head: SoftmaxHead, other: SoftmaxHead) -> SoftmaxHead:
    if head.weights is not None and other.weights is not None:
        rows, weights = jnp.vstack([head.rows, other.rows]), jnp.append(head.weights, other.weights)
        return _of_rows(rows, weights, head.tokens and other.tokens)
    a, b = shares(jnp.stack([head.total, other.total]))
    apart = jnp.sqrt(a * b) * (head.mean - other.mean)
    rows = jnp.vstack([jnp.sqrt(a) * _centred(head), jnp.sqrt(b) * _centred(other), apart])
    return SoftmaxHead(a * head.mean + b * other.mean, rows, None, head.total + other.total, False)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _compressed(head: SoftmaxHead, max_rows: int, sketch: str) -> SoftmaxHead:
    C = _centred(head)
    if sketch == "frequent_directions":
        return dataclasses.replace(head, rows=frequent_directions(C, max_rows), weights=None, tokens=False)
    largest = jnp.argsort(-jnp.sum(C * C, -1))
    if head.weights is None:
        return dataclasses.replace(head, rows=C[largest[:max_rows]])
    retained = largest[: max_rows - 1]
    others = head.weights.at[retained].set(0)
    mean = exact_sum(shares(others)[:, None] * head.rows, 0)
    return _of_rows(jnp.vstack([head.rows[retained], mean]), jnp.append(head.weights[retained], jnp.sum(others)), False)


@jax.jit
def _variances(head: SoftmaxHead) -> Array:
    """``s_t p_t (1 - p_t)``."""
    return _shares(head)[:, None] * head.rows * complement(head.rows)


@jax.jit
def _product(head: SoftmaxHead, Y: Array) -> Array:
    # G 1 = 0: what is constant would only be lost again.
    Y = Y - matmul(head.mean, Y)
    return head.mean[:, None] * Y - matmul(head.rows.T, _shares(head)[:, None] * matmul(head.rows, Y))


@functools.partial(jax.jit, static_argnums=3)
def _solution(head: SoftmaxHead, Y: Array, λ: Array, zero_sum: bool) -> Array:
    ȳ = exact_sum(Y, 0) / len(Y)
    if head.weights is None:
        x = head_solve.by_woodbury(head.mean, head.rows, Y - ȳ, λ)
    else:
        x = head_solve.by_elimination(head.mean, _shares(head)[:, None] * head.rows, Y - ȳ, λ)
    return x if zero_sum else x + ȳ / λ


@jax.jit
def _condition(head: SoftmaxHead, λ: Array) -> Array:
    return head_solve.condition(head.mean, _centred(head), λ)
