"""The Kronecker product that is best for a layer's exact block, by alternating between its factors."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ...linalg import eigenbasis, unit_frobenius
from .layer_forms import Entries, Product, RowSum, Sums, einsum

__all__ = ["eigenpairs", "of_least_distance", "of_least_divergence"]

ITERATIONS = 1000  # at most: the layers of a small CNN take 5 to 20


class Ridged(NamedTuple):
    """``S + δ I``, in parts: added to S, a δ below its rounding would be lost, and with it the inverse."""

    S: Float[Array, "d d"]
    δ: Float[Array, ""]

    def whole(self) -> Float[Array, "d d"]:
        return self.S + self.δ * jnp.eye(len(self.S), dtype=self.S.dtype)

    def inverse(self) -> Float[Array, "d d"]:
        λ, Q = eigenpairs(self.S)
        return einsum("ij,j,kj->ik", Q, 1 / jnp.maximum(λ + self.δ, jnp.finfo(λ.dtype).tiny), Q)

    def with_unit_mean(self) -> "Ridged":
        mean = jnp.trace(self.whole()) / len(self.S)
        return Ridged(self.S / mean, self.δ / mean)


State = tuple[Array, Array | int, Ridged, Ridged]  # how far R turned, the iteration, L and R


def of_least_divergence(exact: RowSum | Entries, ridge: float) -> Product:
    """``L ⊗ R`` of least KL(N(0, F + ε I) | N(0, L ⊗ R)), with ε in units of F's mean diagonal."""
    sums = Sums(exact)
    scale = jnp.where(sums.mean_diagonal > 0, sums.mean_diagonal, 1)
    ε = jnp.maximum(jnp.asarray(ridge, scale.dtype), 10 * jnp.finfo(scale.dtype).eps)

    def step(R: Ridged) -> tuple[Ridged, Ridged]:
        P = R.with_unit_mean().inverse()  # L ⊗ R does not fix the scale of either, which would be left to rounding
        L = Ridged(sums.left(P) / scale / sums.n, ε * jnp.trace(P) / sums.n)
        P = L.inverse()
        return L, Ridged(sums.right(P) / scale / sums.m, ε * jnp.trace(P) / sums.m)

    L, R = _until_it_stands(step, sums)
    return Product(L * sums.mean_diagonal, R)


def of_least_distance(exact: RowSum | Entries) -> Product:
    """``L ⊗ R`` of least |F - L ⊗ R| in Frobenius norm."""
    sums = Sums(exact)

    def step(R: Ridged) -> tuple[Ridged, Ridged]:
        L = sums.left(unit_frobenius(R.S))
        return Ridged(L, R.δ), Ridged(sums.right(unit_frobenius(L)), R.δ)

    L, R = _until_it_stands(step, sums)
    return Product(unit_frobenius(L), R)


def eigenpairs(A: Float[Array, "... d d"]) -> tuple[Float[Array, "... d"], Float[Array, "... d d"]]:
    """Eigenvalues of a positive semidefinite matrix, those that are rounding as 0, and its eigenvectors."""
    Q = eigenbasis(A)
    λ = jnp.sum(Q * einsum("...ij,...jk->...ik", A, Q), -2)
    noise = A.shape[-1] * jnp.finfo(A.dtype).eps * jnp.max(λ, -1, keepdims=True)
    return jnp.where(λ > noise, λ, 0), Q


def _until_it_stands(step: Callable[[Ridged], tuple[Ridged, Ridged]], sums: Sums) -> tuple[Array, Array]:
    """``L, R = step(R)`` from the identity, until R no longer turns."""
    dtype = sums.mean_diagonal.dtype
    identity = lambda d: Ridged(jnp.eye(d, dtype=dtype), jnp.zeros((), dtype))  # noqa: E731

    def unfinished(state: State) -> Array:
        turned, i, *_ = state
        return (turned > jnp.finfo(dtype).eps ** 0.75) & (i < ITERATIONS)

    def body(state: State) -> State:
        _, i, _, R = state
        L, new = step(R)
        return jnp.linalg.norm(unit_frobenius(new.whole()) - unit_frobenius(R.whole())), i + 1, L, new

    start = (jnp.asarray(jnp.inf, dtype), 0, identity(sums.m), identity(sums.n))
    *_, L, R = jax.lax.while_loop(unfinished, body, start)
    return L.whole(), R.whole()
