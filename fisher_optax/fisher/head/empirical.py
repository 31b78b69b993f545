"""The empirical Fisher of logits: second moment of the gradients of single tokens' losses, ``G = Uᵀ U``."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from ...linalg.blocks import eigenpairs, frequent_directions
from .solve import (
    check_counted,
    check_sketch,
    check_vocabularies,
    columns,
    complement,
    damping_of,
    finite_rows,
    matmul,
    probabilities,
    shares,
    tokens_and_weights,
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("rows", "total"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class EmpiricalHead:
    """``G = Σ_t s_t δ_t δ_tᵀ``, V x V, of shares ``s_t = w_t / Σ w`` and the gradients δ_t of each token's own loss.

    It is no Fisher: that of the model is `SoftmaxHead`, which needs no labels.

    Example:
      >>> import jax.numpy as jnp
      >>> from fisher_optax.fisher.head.empirical import EmpiricalHead
      >>> head = EmpiricalHead.from_logits(jnp.zeros((2, 2)), jnp.array([0, 1]))
      >>> print(head.dense().round(3))
      [[ 0.25 -0.25]
       [-0.25  0.25]]
    """

    # Arrays, or what JAX puts in their places.
    rows: PyTree  # (r, V): U, rows sqrt(s_t) δ_t
    total: PyTree  # (): Σ w

    @classmethod
    def from_gradients(cls, gradients: ArrayLike, weights: ArrayLike | None = None) -> "EmpiricalHead":
        """Of gradients ``(*positions, V)`` of each token's loss by its logits: not of the mean, nor times ``w_t``.

        Weights, and what raises, are as in `SoftmaxHead.from_logits`; a gradient that is not finite counts for nothing.
        """
        return _of(*finite_rows(*tokens_and_weights("EmpiricalHead", "gradients", gradients, weights)))

    @classmethod
    def from_logits(cls, logits: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> "EmpiricalHead":
        """Of the cross-entropy of labels ``(*positions,)``: ``δ_t = p_t - e_y``.

        Raises:
          ValueError: as `SoftmaxHead.from_logits`, and for a label that counts and is not of the vocabulary. Under
            `jax.jit` a token with such a label counts for nothing.
        """
        z, w = tokens_and_weights("EmpiricalHead", "logits", logits, weights)
        y, wanted = jnp.asarray(labels), jnp.shape(logits)[:-1]
        if y.shape != wanted or not jnp.issubdtype(y.dtype, jnp.integer):
            raise ValueError(f"EmpiricalHead: got labels {y.dtype} {y.shape}; wanted integers {wanted}.")
        y = y.reshape(-1)
        if not isinstance(y, Tracer) and not isinstance(w, Tracer):
            counted = np.asarray(y)[np.asarray(w) > 0]
            wrong = counted[(counted < 0) | (counted >= z.shape[1])]
            if len(wrong):
                raise ValueError(f"EmpiricalHead: got label {wrong[0]}; wanted 0 to {z.shape[1] - 1}, or weight 0.")
        return _of(*_scores(z, y, w))

    def merge(self, other: "EmpiricalHead", max_rows: int | None = None) -> "EmpiricalHead":
        """The head of the tokens of both, weighted by their totals; exact, but for `compress` to ``max_rows``.

        Raises:
          ValueError: for another vocabulary, and as `compress`.
        """
        check_vocabularies("EmpiricalHead", self.rows.shape[1], other.rows.shape[1])
        return _merged(self, other).compress(max_rows)

    def compress(self, max_rows: int | None) -> "EmpiricalHead":
        """At most ``max_rows`` rows, by frequent directions (Liberty 2013): G only shrinks, by at most the first
        eigenvalue left out in any direction.

        Raises:
          ValueError: for a ``max_rows`` that is no count.
        """
        check_sketch("EmpiricalHead", max_rows, "frequent_directions")
        if max_rows is None or len(self.rows) <= max_rows:
            return self
        return dataclasses.replace(self, rows=frequent_directions(self.rows, max_rows))

    def matvec(self, Y: ArrayLike) -> Array:
        """``G Y`` for Y of ``(V, features)`` or ``(V,)``.

        Raises:
          ValueError: for another shape.
        """
        return columns("EmpiricalHead.matvec", Y, self.rows, lambda Y: _product(self, Y))

    def dense(self) -> Float[Array, "V V"]:
        """All V² entries."""
        return _product(self, jnp.eye(self.rows.shape[1], dtype=self.rows.dtype))

    def solve(self, Y: ArrayLike, damping: ArrayLike) -> Array:
        """``(G + λ)⁻¹ Y = (Y - Uᵀ (λ + U Uᵀ)⁻¹ U Y) / λ``, by Woodbury's identity.

        Where Y lies in the span of the gradients, float32 leaves about ``1e-7 |G| / λ`` of error.

        Raises:
          ValueError: where Y does not fit, or damping is not above 0 (under `jax.jit` the least number above 0 then).
        """
        λ = damping_of("EmpiricalHead.solve", damping, self.rows.dtype)
        return columns("EmpiricalHead.solve", Y, self.rows, lambda Y: _solution(self, Y, λ))


def _of(gradients: Array, w: Array) -> EmpiricalHead:
    head = _of_rows(gradients, w)
    check_counted("EmpiricalHead", head.total)
    return head


@jax.jit
def _of_rows(gradients: Array, w: Array) -> EmpiricalHead:
    return EmpiricalHead(jnp.sqrt(shares(w))[:, None] * gradients, jnp.sum(w))


@jax.jit
def _scores(z: Array, y: Array, w: Array) -> tuple[Array, Array]:
    """``p - e_y``, and weights that are 0 for other labels too."""
    p, w = probabilities(z, jnp.where((y >= 0) & (y < z.shape[1]), w, 0))
    return jnp.where(jax.nn.one_hot(y, z.shape[1], dtype=bool), -complement(p), p), w


@jax.jit
def _merged(head: EmpiricalHead, other: EmpiricalHead) -> EmpiricalHead:
    a, b = shares(jnp.stack([head.total, other.total]))
    return EmpiricalHead(jnp.vstack([jnp.sqrt(a) * head.rows, jnp.sqrt(b) * other.rows]), head.total + other.total)


@jax.jit
def _product(head: EmpiricalHead, Y: Array) -> Array:
    return matmul(head.rows.T, matmul(head.rows, Y))


@jax.jit
def _solution(head: EmpiricalHead, Y: Array, λ: Array) -> Array:
    U = head.rows
    μ, Q = eigenpairs(matmul(U, U.T))
    QU = matmul(Q.T, U)
    return (Y - matmul(QU.T, matmul(QU, Y) / (jnp.maximum(μ, 0) + λ)[:, None])) / λ
