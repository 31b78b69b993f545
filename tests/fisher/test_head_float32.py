"""Solves of a softmax head in float32, against dense solves in float64 from the same logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax.fisher.head.softmax import SoftmaxHead
from tests.reference import softmax_head as reference
from tests.reference.curvature import relative

V, T = 2000, 256


def logits(kind: Any) -> np.ndarray:
    """Normal logits of a standard deviation, or tokens that know four disjoint sets of words."""
    rng = np.random.default_rng(0)
    if isinstance(kind, float):
        return (kind * rng.standard_normal((T, V))).astype(np.float32)
    elsewhere = np.arange(T)[:, None] % 4 != np.arange(V) % 4
    return np.where(elsewhere, -np.inf, rng.standard_normal((T, V))).astype(np.float32)


def right_sides() -> tuple[np.ndarray, np.ndarray]:
    """Columns that sum to 0 exactly in float32, and some that do not."""
    Y = np.random.default_rng(1).standard_normal((2, V, 4))
    zero = np.round(Y[0] * 4096) / 4096
    zero[-1] -= zero.sum(0)
    return zero, Y[1].astype(np.float32).astype(np.float64)


def of_gradients(P: np.ndarray) -> np.ndarray:
    """Gradients of a kernel under cross-entropy: their float32 columns sum to 0 but for rounding."""
    rng = np.random.default_rng(2)
    return (P - np.eye(V)[rng.integers(0, V, T)]).T @ rng.standard_normal((T, 4)) / T


DAMPINGS = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)  # of the mean of p̄
make = jax.jit(SoftmaxHead.from_logits)
solve = jax.jit(lambda head, Y, damping, zero_sum: head.solve(Y, damping, zero_sum), static_argnums=3)
with_info = jax.jit(lambda head, Y, damping: head.solve_with_info(Y, damping, True))


CONDITIONS = {0.0: (0.99, 1.1), 3.0: (4, 20), 10.0: (1e3, 1e5), 30.0: (1e5, 1e9), "apart": (1e5, 1e9)}  # at 1e-8


@pytest.mark.parametrize("kind", CONDITIONS)
def test_float32_solves_to_rounding_whatever_the_damping_and_the_condition(kind: Any) -> None:
    """Where S of Woodbury's identity is well conditioned, and where its condition number is 1e8; it says which."""
    z = logits(kind)
    head, P = make(z), reference.softmax(z)
    G, (zero, general), gradients = reference.laplacian(P, np.ones(T)), right_sides(), of_gradients(P)
    for damping in DAMPINGS:
        λ = float(np.float32(damping / V))
        wanted = reference.solve(G, np.hstack([zero, gradients, general]), λ)
        x, condition, trusted = with_info(head, np.hstack([zero, gradients]).astype(np.float32), λ)
        assert trusted
        assert relative(x[:, :4], wanted[:, :4]) < 2e-6
        assert relative(x[:, 4:], wanted[:, 4:8]) < 2e-6
        assert (np.sum(zero * np.asarray(x[:, :4]), 0) > 0).all()
        assert relative(solve(head, general.astype(np.float32), λ, False), wanted[:, 8:]) < 1e-5
        exact = reference.condition(P, np.ones(T), λ)
        assert abs(condition / exact - 1) < 1e-6 * exact or min(condition, exact) > 1e5
    least, most = CONDITIONS[kind]
    assert least < condition < most


@pytest.mark.parametrize("kind", [3.0, 30.0, "apart"])
def test_signed_rows_solve_as_exactly_as_their_condition_allows(kind: Any) -> None:
    """T - 1 frequent directions lose nothing of T centred rows."""
    z = logits(kind)
    head, P, (zero, _) = make(z).compress(T - 1, "frequent_directions"), reference.softmax(z), right_sides()
    G = reference.laplacian(P, np.ones(T))
    for damping in DAMPINGS[::2]:
        λ = float(np.float32(damping / V))
        x, condition, trusted = with_info(head, zero.astype(np.float32), λ)
        assert np.isfinite(x).all()
        assert (np.sum(zero * np.asarray(x), 0) > 0).all()
        assert trusted == (condition <= 1e4)
        assert not trusted or relative(x, reference.solve(G, zero, λ)) < max(2e-6, 1e-6 * float(condition))
        exact = reference.condition(P, np.ones(T), λ)
        assert exact < 2e4 if trusted else exact > 5e3


def test_woodbury_as_it_stands_loses_its_digits() -> None:
    """Undeflated, S has a condition number of 1/λ: nothing is left of a general solution, two digits where 1ᵀy = 0."""
    z, Y, λ = logits(3.0), right_sides(), np.float32(1e-8 / V)
    P, G = jax.nn.softmax(z), reference.laplacian(reference.softmax(z), np.ones(T))
    d = P.mean(0) + λ
    S = jnp.eye(T) - jnp.matmul(P / d, P.T) / T
    assert reference.condition(reference.softmax(z), np.ones(T), float(λ)) < 20
    for y, zero_sum, naive, ours in zip(Y, (True, False), (5e-3, 0.9), (1e-6, 1e-5), strict=True):
        y_d, wanted = y.astype(np.float32) / d[:, None], reference.solve(G, y, float(λ))
        assert relative(y_d + (P / d).T @ jnp.linalg.solve(S, P @ y_d) / T, wanted) > naive
        assert relative(solve(make(z), y.astype(np.float32), λ, zero_sum), wanted) < ours


def test_means_of_many_equal_tokens_keep_their_digits() -> None:
    z = np.zeros((4096, 9), np.float32)
    np.testing.assert_allclose(SoftmaxHead.from_logits(z).mean, np.full(9, 1 / 9), rtol=1e-7)
    assert abs(jnp.ones(4096) / 4096 @ jnp.full((4096, 9), 1 / 9) * 9 - 1).max() > 1e-6
