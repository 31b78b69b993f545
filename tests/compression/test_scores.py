"""Pruning by scores: masks by the definitions, weights untouched but for those that go, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from tests.reference import pruning_scores as reference

RNG = np.random.default_rng(0)
# Small whole numbers: products are exact in every precision, and many scores are tied.
W = RNG.integers(-3, 4, (12, 5)).astype(np.float32)
F = RNG.integers(0, 4, (12, 5)).astype(np.float32)
ROOTS = RNG.integers(0, 4, 12).astype(np.float32)  # one dead input or more
H = np.diag(ROOTS**2) + np.triu(np.ones((12, 12), np.float32), 1)  # what is off the diagonal is not read
SCORES = {"magnitude": np.abs(W), "wanda": np.abs(W) * ROOTS[:, None], "fisher": F * W**2 / 2}
CALLS: dict[str, Any] = {
    "magnitude": lambda W, *args, **options: fo.compression.magnitude(W, *args, **options),
    "wanda": lambda W, *args, **options: fo.compression.wanda(W, H, *args, **options),
    "fisher": lambda W, *args, **options: fo.compression.fisher(W, F, *args, **options),
}
PLAIN = {
    "magnitude": fo.compression.magnitude_scores(W),
    "wanda": fo.compression.wanda_scores(W, H),
    "fisher": fo.compression.fisher_scores(W, F),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("method", CALLS)
def test_masks_and_weights_are_those_of_the_definition(method: str, dtype: Any) -> None:
    """With ties, in every scope; what stays is bit for bit what it was, in its dtype, and nothing given is changed."""
    assert (ROOTS == 0).any()
    before, own_scope = W.copy(), "output" if method == "wanda" else "matrix"
    np.testing.assert_array_equal(PLAIN[method], SCORES[method])
    for sparsity, pattern, options in (
        (0.55, 0.55, {}),
        (0.3, 0.3, {"scope": "output"}),
        (0.7, 0.7, {"scope": "matrix"}),
        ("2:4", (2, 4), {}),
    ):
        wanted = reference.mask(SCORES[method], pattern, options.get("scope", own_scope))
        weights, mask = CALLS[method](jnp.asarray(W, dtype) if dtype != jnp.float32 else W, sparsity, **options)
        assert weights.dtype == dtype
        np.testing.assert_array_equal(mask, wanted)
        np.testing.assert_array_equal(np.asarray(weights, np.float32), np.where(wanted, W, 0))
    np.testing.assert_array_equal(W, before)


def test_stacks_traced_shares_and_jit() -> None:
    """A stack of kernels is pruned one by one; under `jit` the result is the same, with constants there too."""
    stack, grams = np.stack([W, -W[::-1]]), np.stack([H, H[::-1, ::-1]])
    pruned = jax.jit(fo.compression.wanda)(stack, grams, 0.5)
    for i in range(2):
        wanted = fo.compression.wanda(stack[i], grams[i], 0.5)
        np.testing.assert_array_equal(pruned.mask[i], wanted.mask)
        np.testing.assert_array_equal(pruned.weights[i], wanted.weights)
    gated = lambda X: fo.compression.fisher(X, jnp.asarray(F), 0.5, upper=jnp.asarray(F), threshold=9.0).mask  # noqa: E731
    np.testing.assert_array_equal(jax.jit(gated)(W), gated(W))


def test_wanda_of_white_inputs_is_magnitude_by_output() -> None:
    X = RNG.standard_normal((12, 5)).astype(np.float32)
    for sparsity in (0.55, "2:4"):
        wanted = fo.compression.magnitude(X, sparsity, scope="output")
        np.testing.assert_array_equal(fo.compression.wanda(X, np.eye(12), sparsity).mask, wanted.mask)


@pytest.mark.usefixtures("x64")
def test_doubles_are_scored_as_doubles() -> None:
    """Weights that are one in float32."""
    X = np.array([[1 + 1e-12, 1.0, 1 + 3e-12, 1 + 2e-12]])
    for pruned in (fo.compression.magnitude(X, 0.5), fo.compression.fisher(X, np.ones((1, 4)), 0.5)):
        np.testing.assert_array_equal(pruned.mask, [[False, False, True, True]])
        assert pruned.weights.dtype == jnp.float64


def test_fisher_does_not_depend_on_the_scale() -> None:
    """Neither that of the loss nor of the weights, where ``F W²`` leaves float32 at both ends."""
    X, G = RNG.standard_normal((2, 12, 5)).astype(np.float32)
    wanted = fo.compression.fisher(X, G**2, 0.5).mask
    for scale in (1e-15, 1e15):
        np.testing.assert_array_equal(fo.compression.fisher(scale * X, (scale * G) ** 2, 0.5).mask, wanted)


def test_only_what_is_certainly_unimportant_goes() -> None:
    """The k smallest of those whose upper end is below the threshold, or all of them, by output too."""
    X, G = RNG.standard_normal((2, 12, 5)).astype(np.float32)
    F, upper = G**2, G**2 + RNG.exponential(1, (12, 5)).astype(np.float32)
    sure = upper * X**2 / 2 < 0.2
    scores = np.where(sure, F * X**2 / 2, np.inf)
    assert 12 < sure.sum() < 54
    for sparsity, pattern, scope in ((0.2, 0.2, "matrix"), (0.9, 0.9, "matrix"), ("1:4", (1, 4), "output")):
        weights, mask = fo.compression.fisher(X, F, sparsity, scope=scope, upper=upper, threshold=0.2)
        np.testing.assert_array_equal(mask, reference.mask(scores, pattern, scope) | ~sure)
        np.testing.assert_array_equal(weights, np.where(mask, X, 0))
    assert (~np.asarray(fo.compression.fisher(X, F, 0.2, upper=upper, threshold=0.2).mask)).sum() == 12
    assert (~np.asarray(fo.compression.fisher(X, F, 0.9, upper=upper, threshold=0.2).mask)).sum() == sure.sum()
    # Of an interval that is not known, nothing is sure.
    assert fo.compression.fisher(X, F, 0.5, upper=np.full_like(F, np.inf), threshold=1.0).mask.all()


def test_the_interval_of_a_measured_fisher_gates() -> None:
    """As a user has it: of two weights of equal importance, the one that is known well goes."""
    four, none, m2 = jnp.float32(4), jnp.int32(0), jnp.array([[0.0, 4.0]])
    measured = fo.fisher.DiagonalFisher(jnp.ones((1, 2)), m2, w=four, w2=four, n=none + 4, skipped=none, batches=none)
    _, upper = measured.confidence_interval(0.95)
    pruned = fo.compression.fisher(jnp.ones((1, 2)), measured.mean, 0.9, upper=upper, threshold=0.6)
    np.testing.assert_array_equal(pruned.mask, [[False, True]])
    with pytest.raises(TypeError, match=r"pass its leaf of fisher\.mean"):
        fo.compression.fisher(jnp.ones((1, 2)), measured, 0.5)


NAN = np.where(np.eye(12, 5) == 1, np.nan, F)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: fo.compression.magnitude(np.where(F == 0, np.inf, W), 0.5), ValueError, "of the weights are not fin"),
        (lambda: fo.compression.magnitude(np.ones((2, 2), int), 0.5), TypeError, "got int32"),
        (lambda: fo.compression.magnitude(np.ones(4), 0.5), ValueError, r"got shape \(4,\)"),
        (lambda: fo.compression.wanda(W, H[:5, :5], 0.5), ValueError, r"needs H of \(12, 12\)"),
        (lambda: fo.compression.wanda(W, -H, 0.5), ValueError, "negative diagonal"),
        (
            lambda: fo.compression.fisher(W, F[:, :1], 0.5),
            ValueError,
            r"like the kernel, \(12, 5\); got \(12, 1\)",
        ),
        (lambda: fo.compression.fisher(W, -F, 0.5), ValueError, "F must be at least 0 everywhere"),
        (lambda: fo.compression.fisher(W, NAN, 0.5), ValueError, "F must be at least 0 everywhere"),
        (lambda: fo.compression.fisher(W, F + np.inf, 0.5), ValueError, "60 of 60 entries of F are not finite"),
        (lambda: fo.compression.fisher(W, F, 0.5, upper=F), ValueError, "upper= and threshold= go together"),
        (lambda: fo.compression.fisher(W, F, 0.5, threshold=1.0), ValueError, "upper= and threshold= go together"),
        (lambda: fo.compression.fisher(W, F, 0.5, upper=F / 2, threshold=1.0), ValueError, "upper is below F"),
        (lambda: fo.compression.fisher(W, F, 0.5, upper=F, threshold=-1.0), ValueError, "threshold must be at least 0"),
    ],
)
def test_errors(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
