"""K-FAC's applications: a power of the damped Fisher, in the eigenbasis of its factors or by a root of each.

    (A ⊗ B + λ I)^p G = Q_A [(Q_Aᵀ G Q_B) ∘ (S + λ)^p] Q_Bᵀ,   S = λ_A λ_Bᵀ  (K-FAC)  or the measured diagonal  (EKFAC)

A side of low rank has its r strongest eigenvectors alone; in all other directions its eigenvalue counts as the r-th (0
where there are fewer than r), which makes this the Woodbury identity for p = -1. Source: Puiu 2022 (arXiv 2206.15397).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from ... import linalg
from ..._arguments import value_at
from ...statistics import LayerFactors
from ..contracts import Application, Eigenpairs, InverseRoot, Moments


class DampedState(NamedTuple):
    """State of `damped`: how often it was called, for schedules."""

    count: Int[Array, ""]


def damped(damping: optax.ScalarOrSchedule = 1e-3, exponent: float = -1.0) -> Application:
    """``(A ⊗ B + λ I)^p G`` exactly from eigenpairs; ``A^p G B^p`` from roots, whose factors were damped when read.

    Args:
      damping: λ, number or schedule, in units of the Fisher.
      exponent: p, from -1 (natural gradient) to 0; of roots, the decomposition has it.

    Source: Martens and Grosse 2015 (arXiv 1503.05671), sections 4 and 6.
    """

    def init(G: Float[Array, "m n"]) -> DampedState:
        del G
        return DampedState(jnp.zeros([], jnp.int32))

    def update(
        G: Float[Array, "m n"], state: DampedState, basis: Eigenpairs | InverseRoot, **extra: PyTree
    ) -> tuple[Array, DampedState]:
        del extra
        counted = DampedState(state.count + 1)
        if isinstance(basis, InverseRoot):
            return _between(G, basis), counted
        return _power(G, basis, kronecker_values(basis, G), value_at(damping, state.count), exponent), counted

    nothing = Moments((), ())
    return Application(
        "damped power",
        (Eigenpairs, InverseRoot),
        init,
        update,
        lambda state: nothing,
        lambda state, _: state,
        sees_itself=True,
    )


class CorrectedState(NamedTuple):
    """State of `eigenvalue_corrected`, in the basis."""

    count: Int[Array, ""]
    weight: Float[Array, ""]  # sum of the weights in nu
    nu: Array  # S


def eigenvalue_corrected(
    damping: optax.ScalarOrSchedule = 1e-3, exponent: float = -1.0, decay: optax.ScalarOrSchedule = 0.95
) -> Application:
    """EKFAC: ``S ← β S + (1-β) squares``, the Fisher's own diagonal in the basis, in place of ``λ_A λ_Bᵀ``.

    Until it has seen squares in a basis (those of the first call are in none), S is ``λ_A λ_Bᵀ``.

    Args:
      damping, exponent: as in `damped`.
      decay: β, number or schedule.

    Source: George et al. 2018 (arXiv 1806.03884), Algorithm 1.
    """

    def init(G: Float[Array, "m n"]) -> CorrectedState:
        return CorrectedState(jnp.zeros([], jnp.int32), jnp.zeros([], G.dtype), jnp.zeros_like(G))

    def observe(state: CorrectedState, statistics: LayerFactors, basis: Eigenpairs) -> CorrectedState:
        del basis
        assert statistics.squares is not None
        β = jnp.where(state.count == 0, 1, value_at(decay, state.count))
        nu = β * state.nu + (1 - β) * statistics.squares.astype(state.nu.dtype)
        weight = β * state.weight + (1 - β)
        return CorrectedState(state.count, weight.astype(state.weight.dtype), nu.astype(state.nu.dtype))

    def update(
        G: Float[Array, "m n"], state: CorrectedState, basis: Eigenpairs, **extra: PyTree
    ) -> tuple[Array, CorrectedState]:
        del extra
        measured = state.weight > 0
        S = jnp.where(measured, state.nu / jnp.where(measured, state.weight, 1), kronecker_values(basis, G))
        return _power(G, basis, S, value_at(damping, state.count), exponent), state._replace(count=state.count + 1)

    return Application(
        "eigenvalue-corrected power",
        (Eigenpairs,),
        init,
        update,
        lambda state: Moments((), (state.nu,)),
        lambda state, moments: state._replace(nu=moments.quadratic[0]),
        sees_itself=True,
        observe=observe,
    )


def kronecker_values(basis: Eigenpairs, G: Float[Array, "m n"]) -> Float[Array, "j k"]:
    """``λ_A λ_Bᵀ``; a side without a factor has eigenvalues 1."""
    λ_A = jnp.ones(len(G), G.dtype) if basis.left_values is None else jnp.maximum(basis.left_values, 0)
    λ_B = jnp.ones(G.shape[1], G.dtype) if basis.right_values is None else jnp.maximum(basis.right_values, 0)
    return λ_A[:, None] * λ_B[None, :]


def _power(G: Array, basis: Eigenpairs, S: Array, λ: ArrayLike, p: float) -> Array:
    def f(s: Array) -> Array:
        damped = jnp.asarray(s + λ, G.dtype)
        return jnp.where(damped > 0, jnp.where(damped > 0, damped, 1) ** p, 0)  # without damping, the pseudo-inverse

    if S.shape == G.shape:
        H = linalg.into_basis(basis.left, G, basis.right) * f(S)
        return linalg.out_of_basis(basis.left, H, basis.right).astype(G.dtype)
    Q_B, λ_B = basis.right, basis.right_values
    if Q_B is None or λ_B is None or len(λ_B) == G.shape[1]:
        H = linalg.into_basis(None, G, Q_B)
        return linalg.out_of_basis(None, _on_left(H, basis, λ_B, f), Q_B).astype(G.dtype)
    H = _times(G, Q_B)
    within, beyond = _on_left(H, basis, λ_B, f), _on_left(G - _times(H, Q_B.mT), basis, λ_B[-1:], f)
    return (_times(within, Q_B.mT) + beyond).astype(G.dtype)


def _on_left(H: Array, basis: Eigenpairs, λ_B: Float[Array, " k"] | None, f: Callable[[Array], Array]) -> Array:
    """``f(A ⊗ λ_B) H`` for columns that are eigenvectors of B, with these eigenvalues (or one for all)."""
    Q_A, λ_A = basis.left, basis.left_values
    λ_B = jnp.ones(1, H.dtype) if λ_B is None else jnp.maximum(λ_B, 0)
    if Q_A is None or λ_A is None:
        return H * f(λ_B)
    λ_A = jnp.maximum(λ_A, 0)
    K = _times(Q_A.mT.astype(H.dtype), H)
    U = _times(Q_A.astype(H.dtype), K * f(λ_A[:, None] * λ_B))
    return U if len(λ_A) == len(H) else U + (H - _times(Q_A.astype(H.dtype), K)) * f(λ_A[-1] * λ_B)


def _times(X: Array, Y: Array) -> Array:
    return linalg.times(X, Y.astype(X.dtype))


def _between(G: Array, roots: InverseRoot) -> Array:
    L, R = roots
    U = G if L is None else _times(L.astype(G.dtype), G)
    return U if R is None else _times(U, R)
