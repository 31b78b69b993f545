"""Optimal brain surgery against brute force: every candidate tried with a refit of all others, in every step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.compression.matrix.obs import solve
from tests.reference import pruning as oracle

M, N, DAMPING = 8, 5, 0.01


def problem(seed: int = 0, m: int = M, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the second moment of correlated inputs."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((4 * m, m)) @ (rng.standard_normal((m, m)) / m**0.5 + 0.3 * np.eye(m))
    return rng.standard_normal((m, n)), X.T @ X / len(X)


def assert_relative(x: Any, y: np.ndarray, tolerance: float) -> None:
    assert np.linalg.norm(np.asarray(x, np.float64) - y) <= tolerance * np.linalg.norm(y)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("sparsity", "steps"), [(0.5, 4), (0.8, 7), ("1:4", 6)], ids=str)
def test_every_step_is_the_best_refit(sparsity: Any, steps: int) -> None:
    """Mask, weights and tracked loss; outputs in chunks that do not fill the last one."""
    pattern = (int(sparsity[0]), 4) if isinstance(sparsity, str) else None
    for seed in range(2):
        W, H = problem(seed)
        H_d = oracle.damped(H, DAMPING)
        mask = oracle.greedy(W, H_d, steps, pattern)
        found = solve(jnp.asarray(W), jnp.asarray(H), sparsity, rows=None if steps == 4 else 2)
        np.testing.assert_array_equal(found.mask, mask)
        np.testing.assert_array_equal(np.sum(~mask, 0), steps)
        assert_relative(found.weights, oracle.refit(W, H_d, mask), 1e-9)
        assert not np.any(np.asarray(found.weights)[~mask])
        assert float(found.loss) == pytest.approx(oracle.loss(W, found.weights, H_d), rel=1e-9)


@pytest.mark.usefixtures("x64")
def test_loses_less_than_sparsegpt() -> None:
    """Which takes inputs in their order, and does not let those before make up for those after."""
    for seed in range(4):
        W, H = problem(seed)
        H_d = oracle.damped(H, DAMPING)
        ours, theirs = (f(W, H, 0.5).weights for f in (fo.compression.obs, fo.compression.sparsegpt))
        assert oracle.loss(W, ours, H_d) < oracle.loss(W, theirs, H_d)


@pytest.mark.usefixtures("x64")
def test_equal_scores_go_by_index_and_dead_inputs_first() -> None:
    H = np.diag([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    pruned, mask = fo.compression.obs(np.ones((M, N)), H, 0.5)
    np.testing.assert_array_equal(mask, np.repeat([[0], [0], [0], [0], [1], [1], [1], [1]], N, 1))
    np.testing.assert_array_equal(pruned, mask)


@pytest.mark.usefixtures("x64")
def test_a_singular_second_moment_raises_the_damping_and_says_so() -> None:
    W, H = problem()
    H[:, 1], H[1] = H[:, 0], H[0]
    H[1, 1] = H[0, 0]
    with pytest.warns(UserWarning, match=r"obs: with damping=0.0 H is singular.* 1e-06 was used"):
        found = fo.compression.obs(W, H, 0.5, 0.0)
    H_d = oracle.damped(H, 1e-6)
    assert_relative(found.weights, oracle.refit(W, H_d, np.asarray(found.mask)), 1e-6)
    with pytest.raises(ValueError, match="obs: H is not positive definite"):
        fo.compression.obs(W, H - 1e6 * (np.ones((M, M)) - np.eye(M)), 0.5)


def test_float32_does_not_drift() -> None:
    """80 % of 96 inputs removed: as good as a float64 refit on the same mask. Also narrower weights, and as given."""
    W, H = problem(1, 96, 4)
    H_d = oracle.damped(H, DAMPING)
    given = W.astype(np.float32), H.astype(np.float32)
    before = [x.copy() for x in given]
    new, mask = fo.compression.obs(*given, 0.8)
    assert_relative(new, oracle.refit(W, H_d, np.asarray(mask)), 3e-6)
    np.testing.assert_array_equal(np.sum(~np.asarray(mask), 0), 77)
    narrow = fo.compression.obs(given[0].astype(jnp.bfloat16), given[1], 0.8)
    assert narrow.weights.dtype == jnp.bfloat16
    assert_relative(narrow.weights, oracle.refit(W, H_d, np.asarray(narrow.mask)), 2**-6)
    for x, y in zip(given, before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.usefixtures("x64")
def test_a_batch_is_each_matrix_by_itself() -> None:
    """Under `jit` too."""
    W, H = (np.stack(x) for x in zip(problem(5), problem(6), strict=True))
    both = jax.jit(lambda W, H: fo.compression.obs(W, H, 0.5))(W, H)
    for i in range(2):
        new, mask = fo.compression.obs(W[i], H[i], 0.5)
        np.testing.assert_allclose(both.weights[i], new, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(both.mask[i], mask)


W, H = problem()
ERRORS = {
    "all": (dict(sparsity=1.0), ValueError, r"at least 0 and below 1.*got 1\.0"),
    "pattern": (dict(sparsity="2:3"), ValueError, "this kernel has 8, which 3 does not divide"),
    "scope": (dict(scope="matrix"), ValueError, "its scope is 'output'; got 'matrix'"),
    "rows": (dict(rows=0), ValueError, "rows must be a whole number of outputs, at least 1, or None; got 0"),
    "damping": (dict(damping="1"), TypeError, "damping must be a number"),
    "nan": (dict(H=np.full(H.shape, np.nan)), ValueError, "64 of 64 entries of H are not finite"),
    "shape": (dict(H=np.eye(3)), ValueError, r"needs H of \(8, 8\).*got \(3, 3\)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case: str) -> None:
    wrong, error, match = ERRORS[case]
    arguments = dict(W=W, H=H, sparsity=0.5) | wrong
    with pytest.raises(error, match=match):
        fo.compression.obs(**arguments)


def test_a_traced_share_is_refused() -> None:
    with pytest.raises(TypeError, match="make sparsity static, or use sparsegpt"):
        jax.jit(lambda s: fo.compression.obs(W, H, s))(0.5)
