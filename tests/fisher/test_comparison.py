"""How near two matrices are: against NumPy from the definitions, at any scale, and what is refused."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.fisher.spectra import comparison
from fisher_optax.fisher.spectra.comparison import Against, compare
from tests.reference.approximations import measures


def positive(seed: int, rank: int, d: int = 6) -> np.ndarray:
    X = np.random.default_rng(seed).normal(size=(rank, d))
    return X.T @ X


@pytest.mark.parametrize("large", (False, True))
@pytest.mark.parametrize("rank", (9, 3))
def test_it_is_what_the_definitions_say(rank: int, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of regular and of singular matrices, with both ways to a spectral norm; more damping sees less."""
    monkeypatch.setattr(comparison, "LARGE", 2 if large else 400)
    A, B = positive(0, rank), positive(1, rank)
    λ = 1e-3 * np.trace(B) / 6
    np.testing.assert_allclose(compare(A, B), measures(A, B, λ), rtol=1e-9)
    np.testing.assert_allclose(compare(A, B, 0.5), measures(A, B, 0.5), rtol=1e-9)
    assert compare(A, B, 0.5).kl < compare(A, B).kl < np.inf


@pytest.mark.parametrize("scale", (1e-30, 1.0, 1e30))
def test_the_scale_of_both_changes_nothing(scale: float) -> None:
    A, B = positive(0, 3), positive(1, 3)
    np.testing.assert_allclose(compare(scale * A, scale * B), compare(A, B), rtol=1e-9)


def test_equal_and_empty_matrices() -> None:
    A = positive(0, 3)
    np.testing.assert_allclose(compare(A, A), (0, 1, 0, 0), atol=1e-12)
    assert compare(0 * A, A)[:3] == (1, 0, 1)
    assert 0 < compare(0 * A, A).kl < np.inf


def test_operators_and_one_truth_for_many() -> None:
    A, B = np.float32(positive(0, 3)), np.float32(positive(1, 3))
    operators = [fo.fisher.Operator.from_dense(jnp.asarray(x), jnp.zeros(6)) for x in (A, B)]
    against = Against(operators[1])
    assert compare(*operators) == compare(A, B) == against(A) == against(operators[0])


def test_what_is_no_covariance_has_no_divergence() -> None:
    A = positive(0, 3)
    assert np.isnan(compare(-A, A).kl)
    assert np.isnan(compare(A, -A, damping=1e-3).kl)
    assert compare(-A, A).cosine == pytest.approx(-1)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    (
        (np.eye(2), np.eye(3), {}, r"a is \(2, 2\), b \(3, 3\); wanted matrices of one size"),
        (np.ones((2, 3)), np.eye(2), {}, r"a has shape \(2, 3\); wanted a square matrix"),
        (np.eye(2), np.ones(2), {}, r"b has shape \(2,\); wanted a square matrix"),
        (np.triu(np.ones((2, 2))), np.eye(2), {}, "a is not symmetric, off by 1;"),
        (np.eye(2), np.diag([1, np.nan]), {}, "b has entries that are not finite"),
        (np.eye(2), np.zeros((2, 2)), {}, "b, the truth, is 0 everywhere"),
        (np.eye(2), np.eye(2), {"damping": 0.0}, r"damping gives λ = 0\.0; wanted a positive number"),
        (np.eye(2), -np.eye(2), {}, "b's mean diagonal gives λ = -0.001"),
    ),
)
def test_what_is_wrong_is_said(a: Any, b: Any, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(a, b, **options)
