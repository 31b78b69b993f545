"""SparseGPT against its definition column by column, exact refits, and the limits of its promises."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.compression.matrix.sparsegpt import Plan, _solve, solve
from fisher_optax.linalg import inverse_cholesky
from tests.reference import pruning as oracle

M, N, DAMPING = 12, 3, 0.01


def problem(seed: int = 0, m: int = M, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the second moment of inputs that are correlated and of different sizes."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((4 * m, m)) @ (rng.standard_normal((m, m)) + np.eye(m)) * rng.uniform(0.3, 3, m)
    return rng.standard_normal((m, n)), X.T @ X / len(X)


def relative(x: Any, y: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y))


@pytest.mark.usefixtures("x64")
def test_inverse_cholesky_is_upper_triangular_and_gives_the_inverse() -> None:
    """Also of a batch, of which only the matrix that is singular has its damping raised."""
    H = np.stack([problem(1, 5)[1], np.ones((5, 5))])
    U, used = inverse_cholesky(jnp.asarray(H), 0.0)
    np.testing.assert_array_equal(U, np.triu(U))
    np.testing.assert_allclose(used, [0, 1e-6])
    np.testing.assert_allclose(U[0].T @ U[0] @ H[0], np.eye(5), atol=1e-10)
    np.testing.assert_allclose(U[1].T @ U[1] @ (H[1] + 1e-6 * np.eye(5)), np.eye(5), atol=1e-8)


def test_what_no_damping_makes_positive_gives_nan() -> None:
    U, used = inverse_cholesky(jnp.array([[1.0, 1e6], [1e6, 1.0]]), 0.01)
    assert np.isnan(U).all()
    assert np.isnan(used)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("sparsity", "block", "scope"), [(0.55, 5, "output"), (0.55, 5, "block"), ("2:4", 6, "output")], ids=str
)
def test_equals_the_definition(sparsity: Any, block: int, scope: str) -> None:
    """Every correction made at once, in blocks that do not fill the inputs; exactly ⌈s n⌉ weights go."""
    W, H = problem()
    kind: dict[str, Any] = dict(pattern=(2, 4)) if sparsity == "2:4" else dict(share=sparsity)
    for damping in (DAMPING, 0.5):
        wanted, mask = oracle.sparsegpt(W, H, damping, block, scope=scope, **kind)
        found = fo.compression.sparsegpt(W, H, sparsity, block, damping, scope=scope)
        np.testing.assert_array_equal(found.mask, mask)
        assert relative(found.weights, wanted) < 1e-11
        assert not np.any(np.asarray(found.weights)[~mask])
    removed = np.sum(~np.asarray(found.mask), 0)
    if scope == "block":
        assert removed.sum() == 20  # ⌈.55 * 36⌉
    else:
        np.testing.assert_array_equal(removed, 6 if sparsity == "2:4" else 7)


@pytest.mark.usefixtures("x64")
def test_dead_inputs_get_no_weight_and_leave_the_others_alone() -> None:
    W, H = problem()
    H[4], H[:, 4] = 0, 0
    wanted, mask = oracle.sparsegpt(W, H, DAMPING, 5, share=0.25)
    found = fo.compression.sparsegpt(W, H, 0.25, 5)
    np.testing.assert_array_equal(found.mask, mask)
    assert relative(found.weights, wanted) < 1e-11
    assert not np.any(np.asarray(found.weights)[4])
    assert not np.any(mask[4])


@pytest.mark.usefixtures("x64")
def test_a_given_mask_does_not_depend_on_the_block_size() -> None:
    """1, 7 and all inputs; the tracked loss is that of H_d, and a prefix of inputs is made up for exactly."""
    W, H = problem(2)
    masks = np.random.default_rng(3).random(W.shape) < 0.5, np.repeat(np.arange(M) >= 5, N).reshape(M, N)
    H_d = oracle.damped(H, DAMPING)
    for block in (1, 7, 32):
        for mask in masks:
            wanted, _ = oracle.sparsegpt(W, H, DAMPING, 1, mask=mask)
            found = solve(jnp.asarray(W), jnp.asarray(H), None, block, mask=mask)
            np.testing.assert_array_equal(found.mask, mask)
            assert relative(found.weights, wanted) < 1e-11
            assert float(found.loss) == pytest.approx(oracle.loss(W, found.weights, H_d), rel=1e-10)
        assert relative(found.weights, oracle.refit(W, H_d, masks[1])) < 1e-10


@pytest.mark.usefixtures("x64")
def test_correcting_is_better_than_masking_and_refitting_better_still() -> None:
    for seed in range(4):
        W, H = problem(seed)
        new, mask = fo.compression.sparsegpt(W, H, 0.5, 5)
        H_d = oracle.damped(H, DAMPING)
        losses = [oracle.loss(W, x, H_d) for x in (oracle.refit(W, H_d, np.asarray(mask)), new, W * np.asarray(mask))]
        assert losses == sorted(losses)
        assert losses[1] < 0.95 * losses[2]


@pytest.mark.usefixtures("x64")
def test_a_singular_second_moment_raises_the_damping_and_says_so() -> None:
    W, H = problem()
    H[:, 1], H[1] = H[:, 0], H[0]
    H[1, 1] = H[0, 0]
    with pytest.warns(UserWarning, match=r"damping=0.0 H is singular.* 1e-06 was used"):
        found = fo.compression.sparsegpt(W, H, 0.55, 5, 0.0)
    wanted, mask = oracle.sparsegpt(W, H, 1e-6, 5, share=0.55)
    np.testing.assert_array_equal(found.mask, mask)
    assert relative(found.weights, wanted) < 1e-6
    with pytest.raises(ValueError, match=r"H is not positive definite, with damping=0.01 .*Pass the mean of x xᵀ"):
        fo.compression.sparsegpt(W, H - 1e6 * (np.ones((M, M)) - np.eye(M)), 0.55, 5)


def test_float32_and_narrower_weights_share_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in float32 and returned in their dtype; nothing given is written to. Traced once, whatever the share."""
    module, traces = importlib.import_module("fisher_optax.compression.matrix.sparsegpt"), []
    counted = lambda *args: traces.append(args) or inverse_cholesky(*args)  # noqa: E731
    monkeypatch.setattr(module, "inverse_cholesky", counted)
    W, H = problem(n=4)
    for dtype, tolerance, share in ((np.float32, 1e-5, 0.5), (jnp.bfloat16, 2**-7, 0.5), (np.float16, 2**-10, 0.25)):
        wanted, mask = oracle.sparsegpt(W, H, DAMPING, 128, share=share)
        given = np.asarray(W, dtype), H.astype(np.float32)
        before = [x.copy() for x in given]
        found = fo.compression.sparsegpt(*given, share)
        assert found.weights.dtype == dtype
        assert relative(found.weights, wanted) < tolerance
        np.testing.assert_array_equal(found.mask, mask)
        for x, y in zip(given, before, strict=True):
            np.testing.assert_array_equal(x, y)
    assert len(traces) == 1


@pytest.mark.usefixtures("x64")
def test_a_batch_is_each_matrix_by_itself_and_a_share_may_be_traced() -> None:
    W, H = (np.stack(x) for x in zip(problem(5), problem(6), strict=True))
    both = jax.jit(lambda W, H, s: fo.compression.sparsegpt(W, H, s, 5))(W, H, 0.55)
    for i in range(2):
        new, mask = fo.compression.sparsegpt(W[i], H[i], 0.55, 5)
        np.testing.assert_allclose(both.weights[i], new, rtol=1e-10, atol=1e-12)
        np.testing.assert_array_equal(both.mask[i], mask)


def test_the_program_is_as_long_for_any_number_of_inputs() -> None:
    lines = []
    for m in (16, 256):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, m, 4), (1, m, m))]
        counts, plan = jax.ShapeDtypeStruct((m // 8,), jnp.int32), Plan(8, 8, "output", None)
        lines.append(len(_solve.lower(*shapes, None, counts, 0.01, plan).as_text().splitlines()))
    assert lines[0] == lines[1]


W, H = problem()
ERRORS = {
    "both": (dict(mask=np.ones(W.shape, bool)), ValueError, "either a sparsity or.* mask="),
    "neither": (dict(sparsity=None), ValueError, "either a sparsity or"),
    "all": (dict(sparsity=1.0), ValueError, r"at least 0 and below 1.*got 1\.0"),
    "pattern": (dict(sparsity="2:5"), ValueError, "this kernel has 12, which 5 does not divide"),
    "block": (dict(block_size=0), ValueError, "block_size must be a whole number of inputs, at least 1; got 0"),
    "scope": (dict(scope="matrix"), ValueError, "scope must be one of 'output', 'block'; got 'matrix'"),
    "damping": (dict(damping=-0.1), ValueError, r"damping must be at least 0; got -0\.1"),
    "mask": (
        dict(sparsity=None, mask=np.ones((12, 2), bool)),
        ValueError,
        r"mask must be bool, of the shape \(12, 3\)",
    ),
    "nan": (dict(W=np.full(W.shape, np.nan)), ValueError, "36 of 36 entries of the weights are not finite"),
    "shape": (dict(H=np.eye(3)), ValueError, r"needs H of \(12, 12\).*got \(3, 3\)"),
    "empty": (dict(W=np.ones((12, 0))), ValueError, r"nothing to prune in a kernel of shape \(12, 0\)"),
    "integers": (dict(W=np.ones((12, 3), int)), TypeError, "floating-point weights; got int32"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case: str) -> None:
    wrong, error, match = ERRORS[case]
    arguments = dict(W=W, H=H, sparsity=0.5) | wrong
    with pytest.raises(error, match=match):
        fo.compression.sparsegpt(**arguments)
