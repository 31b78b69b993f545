"""Spectra against dense eigenvalues, also where Krylov spaces end early; quadrature and its error bars."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax.fisher.operators.operator import Operator
from fisher_optax.fisher.spectra.capacity import block_spectra
from fisher_optax.fisher.spectra.spectrum import Density, Spectrum, _quadrature, _smoothed, _spectrum, density, spectrum

D = 50
RNG = np.random.default_rng(0)
PROGRAMS: tuple[Any, ...] = (_spectrum, _quadrature)
HAAR = np.linalg.qr(RNG.standard_normal((D, D)))[0]
BOTH = pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])


def symmetric(λ: Any) -> np.ndarray:
    return (HAAR * np.asarray(λ)) @ HAAR.T


def operator(A: np.ndarray, like: Any = None) -> Operator:
    return Operator.from_dense(jnp.asarray(A), jnp.zeros(len(A)) if like is None else like)


DECAY = 0.6 ** np.arange(D)
RANK3 = np.array([3.0, 2.0, 1.0] + [0.0] * (D - 3))
MATRICES = {
    "decaying": symmetric(DECAY),
    "tiny": 1e-25 * symmetric(DECAY),
    "rank 3": symmetric(RANK3),
    "rank 3, tiny": 1e-14 * symmetric(RANK3),
    "rank 3 on coordinates": np.diag(RANK3),
    "identity": np.eye(D),
    "zero": np.zeros((D, D)),
    "triple": symmetric([2.0] * 3 + list(0.5 ** np.arange(D - 3))),
    "dead coordinates": np.pad(symmetric(DECAY)[:30, :30], (0, 20)),
}


def assert_spectrum(A: np.ndarray, k: int, double: bool) -> None:
    """Eigenvalues to 1e-6 of the largest (in float64 1e-12), orthonormal vectors, residuals that are what they say."""
    with jax.enable_x64(double):
        found = spectrum(operator(A), k)
        λ, V, residuals = (np.asarray(x, np.float64) for x in found[:3])
        flags = np.asarray(found.converged)
    tolerance = 1e-12 if double else 1e-6
    assert found.vectors.dtype == (jnp.float64 if double else jnp.float32)
    size = float(np.linalg.norm(A, 2))
    np.testing.assert_allclose(λ, np.linalg.eigvalsh(A)[::-1][:k], rtol=0, atol=tolerance * size)
    np.testing.assert_allclose(V @ V.T, np.eye(k), rtol=0, atol=2 * tolerance)
    np.testing.assert_allclose(residuals, np.linalg.norm(V @ A - λ[:, None] * V, axis=1), rtol=0, atol=tolerance * size)
    assert (np.diff(λ) <= 0).all()
    assert flags.all()


@BOTH
@pytest.mark.parametrize("k", [5, D], ids=["lanczos", "all"])
@pytest.mark.parametrize("name", MATRICES)
def test_eigenvalues_are_those_of_the_dense_matrix(name: str, k: int, double: bool) -> None:
    assert_spectrum(MATRICES[name], k, double)


@pytest.mark.parametrize("λ", [RANK3, np.ones(D)], ids=["rank 3", "identity"])
def test_twenty_eigenvalues_where_the_krylov_space_ends_early(λ: np.ndarray) -> None:
    """40 iterations of size 200 with at most four directions to find: the others are zeros (or ones), with vectors."""
    H = np.linalg.qr(RNG.standard_normal((200, 200)))[0]
    assert_spectrum((H * np.pad(λ, (0, 150), mode="edge")) @ H.T, 20, False)


@pytest.mark.usefixtures("x64")
def test_condition_number_gaps_and_signs() -> None:
    λ = np.concatenate([[4.0, 3.0], np.linspace(1, -8, D - 2)])
    found = spectrum(operator(symmetric(λ)), D)
    np.testing.assert_allclose(found.condition_number, 8 / np.abs(λ).min())
    np.testing.assert_allclose(found.gap, 0.25)
    np.testing.assert_allclose(found.gaps, -np.diff(λ) / 4)
    np.testing.assert_allclose(spectrum(operator(MATRICES["decaying"]), 5).condition_number, 0.6**-4)
    assert spectrum(operator(MATRICES["rank 3"]), 5).condition_number == jnp.inf
    zero = spectrum(operator(MATRICES["zero"]), 5)
    assert zero.gap == 0
    assert zero.condition_number == jnp.inf


@pytest.mark.usefixtures("x64")
def test_what_has_not_converged_says_so() -> None:
    """On a flat spectrum 25 iterations leave residuals, which bound the distance to an eigenvalue."""
    λ = np.linspace(1, 2, D)
    found = spectrum(operator(symmetric(λ)), 5)
    assert not found.converged[-1]
    distances = np.abs(np.asarray(found.eigenvalues)[:, None] - λ).min(1)
    assert (distances <= np.asarray(found.residuals) + 1e-12).all()


def test_trees_of_several_dtypes() -> None:
    """Products are rounded to the tree's own dtypes, and so exact to a unit of the coarsest."""
    like = {"w": jnp.zeros((6, 8), jnp.bfloat16), "b": jnp.zeros(2)}
    A = np.diag(np.r_[50.0, 40, 30, np.linspace(1, 0, D - 3)]).astype(np.float32)
    found = spectrum(operator(A, like), 3)
    np.testing.assert_allclose(found.eigenvalues, [50, 40, 30], rtol=float(jnp.finfo(jnp.bfloat16).eps))
    assert jax.tree.map(jnp.shape, operator(A, like).unravel(found.vectors[0])) == {"w": (6, 8), "b": (2,)}


def test_a_second_operator_of_a_kind_compiles_nothing() -> None:
    A, B = operator(MATRICES["decaying"]), operator(MATRICES["triple"])
    compiled = []
    for of in (A, B):
        spectrum(of, 5)
        density(of, probes=2, iterations=7)
        compiled.append([program._cache_size() for program in PROGRAMS])
    assert compiled[0] == compiled[1]
    assert min(compiled[0]) >= 1


def lopsided() -> Operator:
    return operator(MATRICES["decaying"] + 0.1 * np.triu(RNG.standard_normal((D, D)), 1))


def poisoned() -> Operator:
    A = MATRICES["decaying"].copy()
    A[3, 3] = np.nan
    return operator(A)


GOOD = operator(MATRICES["rank 3"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectrum(GOOD, 0), r"k is 0; wanted 1 to 50"),
        (lambda: spectrum(GOOD, D + 1), r"k is 51; wanted 1 to 50"),
        (lambda: spectrum(GOOD, 10, iterations=9), r"9 iterations .* got k=10"),
        (lambda: spectrum(lopsided(), 5), r"dense is not symmetric: .* differ by .*`tolerance`"),
        (lambda: density(lopsided()), r"dense is not symmetric"),
        (lambda: spectrum(poisoned(), 5), r"dense: its product with a finite vector is not finite"),
        (lambda: density(poisoned()), r"dense: its product with a finite vector is not finite"),
        (lambda: jax.jit(lambda A: spectrum(A, 5).eigenvalues)(GOOD), r"outside jit"),
        (lambda: Spectrum(jnp.ones(1), jnp.ones((1, 1)), jnp.ones(1)).gap, r"call spectrum with k >= 2"),
        (lambda: density(GOOD, probes=1), r"got probes=1"),
        (lambda: density(GOOD, width=0.0), r"width=0.0"),
        (lambda: density(GOOD, grid=np.array([1.0, 0.0])), r"a rising grid"),
        (lambda: density(GOOD, probes=2, iterations=7).expectation(jnp.log), r"f is not finite at the node"),
        (lambda: density(GOOD, probes=2, iterations=7).trace_interval(1.0), r"level is 1.0"),
        (lambda: block_spectra(GOOD, ["w"]), r"no leaf below 'w'"),
    ],
)
def test_errors_say_what_to_do(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_noise_passes_for_symmetric_where_it_is_allowed() -> None:
    assert np.isfinite(spectrum(lopsided(), 5, tolerance=1.0).eigenvalues).all()


def smeared(λ: np.ndarray, x: np.ndarray, σ: float) -> np.ndarray:
    """The density by its definition."""
    return np.exp(-(((x[:, None] - λ) / σ) ** 2) / 2).mean(1) / (σ * np.sqrt(2 * np.pi))


@pytest.mark.usefixtures("x64")
def test_quadrature_is_exact_for_polynomials_below_twice_the_iterations() -> None:
    """And no further: the next moment differs."""
    A, key, m = symmetric(np.linspace(-1, 1, D)), jax.random.key(1), 7
    θ, w = (np.asarray(x) for x in _quadrature(operator(A), jnp.ones(()), key, m))
    v = np.asarray(jax.random.rademacher(jax.random.split(key)[1], (D,), jnp.float64))
    moments = np.array([v @ np.linalg.matrix_power(A, j) @ v / D for j in range(2 * m + 1)])
    found = np.array([w @ θ**j for j in range(2 * m + 1)])
    np.testing.assert_allclose(found[:-1], moments[:-1], rtol=0, atol=1e-13)
    assert abs(found[-1] - moments[-1]) > 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["decaying", "rank 3", "identity", "zero", "dead coordinates"])
def test_all_iterations_give_each_vectors_own_density_exactly(name: str) -> None:
    """Nodes are the eigenvalues, and weights the vector's shares of their eigenspaces."""
    A = MATRICES[name]
    found = density(operator(A), probes=3, iterations=D + 10, grid=np.linspace(-1, 4, 200), width=0.1)
    λ, Q = np.linalg.eigh(A)
    np.testing.assert_allclose(np.asarray(found.nodes), np.tile(λ, (3, 1)), rtol=0, atol=1e-12)
    keys = jax.random.split(jax.random.split(jax.random.key(0))[1], 3)
    V = np.stack([jax.random.rademacher(jax.random.split(k)[1], (D,), jnp.float64) for k in keys])
    exact = np.exp(-(((found.grid[:, None] - λ) / 0.1) ** 2) / 2) @ ((V @ Q) ** 2 / D).T / (0.1 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(found.values, exact.mean(1), rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.standard_error, exact.std(1, ddof=1) / np.sqrt(3), rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.trace, np.einsum("pi,ij,pj->p", V, A, V).mean(), rtol=1e-12, atol=0)


@BOTH
@pytest.mark.parametrize("name", ["decaying", "identity", "zero", "rank 3, tiny"])
def test_density_integrates_to_one(name: str, double: bool) -> None:
    with jax.enable_x64(double):
        found = density(operator(MATRICES[name]), probes=3, iterations=7)
        assert len(found.grid) == 1001
        np.testing.assert_allclose(np.trapezoid(found.values, found.grid), 1, rtol=2e-5)


@pytest.fixture(scope="module")
def hundred() -> tuple[np.ndarray, list[Density]]:
    """Densities of 100 seeds with 16 vectors each, from one vectorised call, of a matrix of size 60."""
    λ = 0.9 ** np.arange(60)
    Q = np.linalg.qr(np.random.default_rng(1).standard_normal((60, 60)))[0]
    A, m = operator((Q * λ) @ Q.T), 12
    draws = [jax.random.split(jax.random.split(jax.random.key(seed))[1], 16) for seed in range(100)]
    θ, w = jax.jit(jax.vmap(lambda key: _quadrature(A, jnp.ones(()), key, m)))(jnp.concatenate(draws))
    none = jnp.zeros(1)
    split = (np.split(np.asarray(x), 100) for x in (θ, w))
    found = [Density(none, none, none, jnp.asarray(a), jnp.asarray(b), 60) for a, b in zip(*split, strict=True)]
    one = density(A, iterations=m, key=jax.random.key(7))
    np.testing.assert_allclose(found[7].trace, one.trace, rtol=1e-5)
    return λ, found


def test_trace_lies_in_its_interval(hundred: tuple[np.ndarray, list[Density]]) -> None:
    """The interval of 95% for 88 of 100 seeds at least, that of 50% for about half."""
    λ, found = hundred
    inside = lambda level: sum(a <= λ.sum() <= b for a, b in (x.trace_interval(level) for x in found))  # noqa: E731
    assert 88 <= inside(0.95) <= 99
    assert 35 <= inside(0.5) <= 65


def test_density_is_unbiased(hundred: tuple[np.ndarray, list[Density]]) -> None:
    """Of 1600 vectors it is the density of the eigenvalues up to 4 standard errors and the quadrature's own error."""
    λ, found = hundred
    x = np.linspace(-0.3, 1.3, 100)
    θ, w = (jnp.concatenate([getattr(d, name) for d in found]) for name in ("nodes", "weights"))
    values, error = (np.asarray(a) for a in _smoothed(θ, w, jnp.asarray(x), 0.1))
    assert (np.abs(values - smeared(λ, x, 0.1)) <= 4 * error + 1e-3).all()
    assert error.max() < 0.05


def test_signs_make_the_trace_of_a_diagonal_matrix_exact() -> None:
    """Its interval has room for rounding alone, and keeps the trace."""
    λ = np.linspace(0.1, 3, D)
    found = density(operator(np.diag(λ)), iterations=7)
    low, high = found.trace_interval()
    assert low <= λ.sum() <= high
    assert high - low < 1e-4 * λ.sum()


@pytest.mark.usefixtures("x64")
def test_log_determinant() -> None:
    λ = np.linspace(0.5, 3, D)
    found = density(operator(symmetric(λ)), probes=32, iterations=7)
    mean, error = found.expectation(jnp.log)
    assert 0 < error < 0.02
    assert abs(mean - np.log(λ).mean()) <= 3 * error
    twice = density(operator(2 * np.eye(D)), probes=2, iterations=7)
    np.testing.assert_allclose(D * twice.expectation(jnp.log)[0], D * np.log(2), rtol=1e-12)


def test_progress_wraps_the_vectors_and_the_blocks() -> None:
    seen = []
    wrap = lambda items: (seen.append(item) or item for item in items)  # noqa: E731
    density(GOOD, probes=3, iterations=7, progress=wrap)
    block_spectra(operator(np.eye(3), {"a": jnp.zeros(2), "b": jnp.zeros(1)}), progress=wrap)
    assert seen == [0, 1, 2, "a", "b"]
