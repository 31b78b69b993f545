"""oBERT against the paper's recursion, the exact quadratic model and its joint minimum, in float64."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from tests.reference import pruning_scores as reference

RNG = np.random.default_rng(0)
# Blocks of 8 leave 6 for the last of 30 weights, and one block crosses from an output to the next.
W, BLOCK, λ = RNG.standard_normal((6, 5)), 8, 1e-3
GRADS = RNG.standard_normal((40, 6, 1)) + 0.5 * RNG.standard_normal((40, 6, 5))
FISHER = reference.dense(reference.block_fisher(GRADS, BLOCK), λ)


def gone(pruned: fo.compression.Pruned) -> set[int]:
    return set(np.flatnonzero(~np.asarray(pruned.mask)).tolist())


def close(x: Any, y: Any, tolerance: float = 1e-11) -> None:
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.max(np.abs(y)))


@pytest.mark.usefixtures("x64")
def test_moments_are_means_by_block_and_merge() -> None:
    """Zeros fill the last block; means of halves average to the whole's; small floats are added up in float32."""
    F = fo.compression.block_moments(jnp.asarray(GRADS), BLOCK)
    assert F.shape == (4, 8, 8)
    for block, wanted in zip(F, reference.block_fisher(GRADS, BLOCK), strict=True):
        close(block[: len(wanted), : len(wanted)], wanted)
        assert not np.any(block[len(wanted) :])
        assert not np.any(block[:, len(wanted) :])
    close((fo.compression.block_moments(GRADS[:20], 8) + fo.compression.block_moments(GRADS[20:], 8)) / 2, F)
    assert fo.compression.block_moments(jnp.asarray(GRADS, jnp.bfloat16), 100).shape == (1, 30, 30)
    assert fo.compression.block_moments(jnp.asarray(GRADS, jnp.bfloat16), BLOCK).dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_scores_are_those_of_the_papers_recursion() -> None:
    """One Cholesky of the sum inverts what m rank-one corrections do."""
    G = GRADS.swapaxes(1, 2).reshape(40, 30)[:, :BLOCK]
    inverse = reference.recursion(G, λ * float(np.mean(GRADS**2)))
    scores = fo.compression.obert_scores(jnp.asarray(W), fo.compression.block_moments(GRADS, BLOCK), damping=λ)
    close(np.ravel(scores.T)[:BLOCK], np.ravel(W.T)[:BLOCK] ** 2 / (2 * np.diag(inverse)))
    close(scores, reference.scores(W, FISHER))


def test_float32_errs_by_the_condition_number() -> None:
    """With less examples than weights; with many, the sum is nearer to float64 than the recursion in float32."""
    for m, damping in ((25, 1e-3), (100, 1e-4)):
        G = RNG.standard_normal((m, 50)).astype(np.float32)
        absolute = damping * float(np.mean(G.astype(float) ** 2))
        F = fo.compression.block_moments(G[:, :, None], 50)
        ours = 1 / (2 * np.asarray(fo.compression.obert_scores(np.ones((50, 1)), F, damping=damping), float)[:, 0])
        theirs, exact = (np.diag(reference.recursion(G, absolute, dtype)) for dtype in (np.float32, np.float64))
        errors = [np.max(np.abs(x / exact - 1)) for x in (ours, theirs)]
        condition = 1 + np.linalg.norm(G, 2) ** 2 / m / absolute
        assert errors[0] < condition * np.finfo(np.float32).eps
        assert m == 25 or errors[0] < errors[1] / 4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("exact", [False, True])
def test_a_single_removal_is_the_optimal_brain_surgeons(exact: bool) -> None:
    """The cheapest weight by brute force goes, at the cost of its score, and the others are at their minimum."""
    new, mask = fo.compression.obert(W, GRADS, 1e-9, BLOCK, damping=λ, exact=exact)
    costs = []
    for j in range(30):
        stays = np.arange(30).reshape(6, 5) != j
        costs.append(reference.rise(W, reference.joint_minimum(W, FISHER, stays), FISHER))
    assert gone(fo.compression.Pruned(new, mask)) == {int(np.argmin(costs))}
    close(new, reference.joint_minimum(W, FISHER, np.asarray(mask)))
    close(reference.rise(W, new, FISHER), reference.scores(W, FISHER).min())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("sparsity", "pattern", "scope"), [(0.55, 0.55, "matrix"), (0.5, 0.5, "output"), ("1:3", (1, 3), "matrix")]
)
def test_masks_and_updates_are_those_of_the_definitions(sparsity: Any, pattern: Any, scope: str) -> None:
    """The paper's update adds up single removals; ``exact`` is the joint minimum, which costs less."""
    stays = reference.mask(reference.scores(W, FISHER), pattern, scope)
    paper, exact = (
        fo.compression.obert(W, GRADS, sparsity, BLOCK, damping=λ, exact=e, scope=scope) for e in (False, True)
    )
    np.testing.assert_array_equal(paper.mask, stays)
    np.testing.assert_array_equal(exact.mask, stays)
    close(paper.weights, reference.single_updates(W, FISHER, stays))
    close(exact.weights, reference.joint_minimum(W, FISHER, stays))
    costs = [reference.rise(W, new, FISHER) for new in (exact.weights, paper.weights, np.where(stays, W, 0))]
    assert costs[0] < costs[1]
    assert costs[0] < costs[2]


@pytest.mark.usefixtures("x64")
def test_a_block_of_all_weights_is_the_dense_fisher() -> None:
    F = reference.dense(reference.block_fisher(GRADS, 30), λ)
    stays = reference.mask(reference.scores(W, F), 0.55)
    whole, more = (fo.compression.obert(W, GRADS, 0.55, block, damping=λ, exact=True) for block in (30, 1000))
    np.testing.assert_array_equal(whole.mask, stays)
    close(whole.weights, reference.joint_minimum(W, F, stays), 1e-10)
    np.testing.assert_array_equal(whole.weights, more.weights)


@pytest.mark.usefixtures("x64")
def test_recomputations_go_on_from_what_is_gone() -> None:
    """Each step's mask contains the last one's and has its count; joint updates end at the joint minimum of the last
    mask; and knowing what is gone already makes a cheaper choice.
    """
    steps = [fo.compression.obert(W, GRADS, 0.8, BLOCK, exact=True, damping=λ)]
    for r in (2, 4):
        stages = [
            fo.compression.obert(W, GRADS, 0.8 * t / r, BLOCK, exact=True, damping=λ, recomputations=t)
            for t in range(1, r + 1)
        ]
        assert [len(gone(stage)) for stage in stages] == [24 * t // r for t in range(1, r + 1)]
        assert all(gone(before) < gone(after) for before, after in itertools.pairwise(stages))
        close(stages[-1].weights, reference.joint_minimum(W, FISHER, np.asarray(stages[-1].mask)), 1e-10)
        steps.append(stages[-1])
    costs = [reference.rise(W, step.weights, FISHER) for step in steps]
    assert costs[0] > max(costs[1:])


@pytest.mark.usefixtures("x64")
def test_patterns_are_reached_in_steps() -> None:
    """2:6 over two steps is 4:6, then 2:6."""
    first, last = (
        fo.compression.obert(W, GRADS, pattern, BLOCK, damping=λ, recomputations=r)
        for pattern, r in (("4:6", 1), ("2:6", 2))
    )
    assert gone(first) < gone(last)
    np.testing.assert_array_equal(np.asarray(last.mask).sum(0), 2)


@pytest.mark.usefixtures("x64")
def test_one_step_on_a_mask() -> None:
    """`obert_step` scores what stays as if nothing else were there, never below its score among all; what is gone
    scores -inf and does not come back.
    """
    F = fo.compression.block_moments(GRADS, BLOCK)
    stays = np.arange(30).reshape(6, 5) % 3 != 0
    seen = []

    def everything(scores: jax.Array) -> jax.Array:
        seen.append(np.asarray(scores))
        return jnp.ones(scores.shape, bool)

    new, mask = fo.compression.obert_step(jnp.asarray(W), F, everything, damping=λ, stays=stays)
    np.testing.assert_array_equal(mask, stays)
    np.testing.assert_array_equal(new, np.where(stays, W, 0))
    kept = stays.T.ravel()
    wanted = W.T.ravel()[kept] ** 2 / (2 * np.diag(np.linalg.inv(FISHER[np.ix_(kept, kept)])))
    close(seen[0].T.ravel()[kept], wanted)
    np.testing.assert_array_equal(fo.compression.obert_scores(W, F, damping=λ, stays=stays), seen[0])
    assert np.all(np.isneginf(seen[0][~stays]))
    assert np.all(wanted >= reference.scores(W, FISHER).T.ravel()[kept] * (1 - 1e-12))


def test_stacks_jit_and_traced_shares() -> None:
    """A stack of kernels is pruned one by one; under `jit` with a traced share the result is the same."""
    stack = np.stack([W, W[::-1]]).astype(np.float32)
    grads = np.stack([GRADS, GRADS[::-1] ** 3], 1).astype(np.float32)
    before = stack.copy(), grads.copy()
    prune = jax.jit(lambda W, g, s: fo.compression.obert(W, g, s, BLOCK, recomputations=2))
    pruned = prune(stack, grads, 0.6)
    for i in range(2):
        alone = fo.compression.obert(stack[i], grads[:, i], 0.6, BLOCK, recomputations=2)
        np.testing.assert_array_equal(pruned.mask[i], alone.mask)
        np.testing.assert_allclose(pruned.weights[i], alone.weights, rtol=0, atol=1e-5)
        assert len(gone(alone)) == 18
    np.testing.assert_array_equal(stack, before[0])
    np.testing.assert_array_equal(grads, before[1])
    assert np.all(np.isnan(prune(stack, np.where(grads > 3, np.nan, grads), 0.6).weights).any((1, 2)))


def test_the_scale_of_the_loss_does_not_matter() -> None:
    """Bit for bit, where squares of gradients leave float32 at both ends, and for bfloat16 weights."""
    X, g = jnp.asarray(W, jnp.bfloat16), np.asarray(GRADS, np.float32)
    wanted = fo.compression.obert(X, g, 0.5, BLOCK)
    assert wanted.weights.dtype == jnp.bfloat16
    wide = fo.compression.obert(X.astype(jnp.float32), g, 0.5, BLOCK)
    np.testing.assert_array_equal(wanted.mask, wide.mask)
    np.testing.assert_array_equal(wanted.weights, wide.weights.astype(jnp.bfloat16))
    for power in (-90, 90):
        scaled = fo.compression.obert(X, np.ldexp(g, power), 0.5, BLOCK)
        np.testing.assert_array_equal(scaled.mask, wanted.mask)
        np.testing.assert_array_equal(scaled.weights, wanted.weights)


def test_a_kernel_without_gradients_is_pruned_by_magnitude() -> None:
    X = W.astype(np.float32)
    weights, mask = fo.compression.obert(X, np.zeros((40, 6, 5), np.float32), 0.5, BLOCK)
    np.testing.assert_array_equal(mask, fo.compression.magnitude(X, 0.5).mask)
    np.testing.assert_array_equal(weights, np.where(mask, X, 0))


def test_a_singular_fisher_raises_the_damping_and_says_so() -> None:
    """Four examples for eight weights, undamped: rounding must not pass for a pivot."""
    X, g = W.astype(np.float32), GRADS[:4].astype(np.float32)
    with pytest.warns(UserWarning, match=r"obert: F \+ 0 of its mean diagonal is singular .* took 1\.\d+e-0\d instead"):
        pruned = fo.compression.obert(X, g, 0.5, BLOCK, damping=0)
    assert np.all(np.isfinite(pruned.weights))
    assert np.max(np.abs(pruned.weights)) < 1e3
    F = fo.compression.block_moments(g, BLOCK)
    with pytest.warns(UserWarning, match=r"obert_step: F \+ 1e-09 .* took 1\.\d+e-0\d instead"):
        fo.compression.obert_step(jnp.asarray(X), F, lambda scores: scores > 1e-3, damping=1e-9)


def test_a_pivot_of_the_size_of_rounding_counts_as_singular() -> None:
    """Cholesky passes this matrix, and its inverse is noise."""
    near = 1 - np.finfo(np.float32).eps
    F = np.array([[[1, near], [near, 1]]], np.float32)
    with pytest.warns(UserWarning, match="is singular to working precision"):
        new, _ = fo.compression.obert_step(jnp.array([[1.0], [2.0]]), F, lambda s: s > jnp.min(s), damping=0)
    np.testing.assert_allclose(new, [[0.0], [3.0]], atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_what_fills_the_last_block_needs_no_damping() -> None:
    F = reference.dense(reference.block_fisher(GRADS, BLOCK), 0)
    new, mask = fo.compression.obert(W, GRADS, 0.55, BLOCK, damping=0, exact=True)
    np.testing.assert_array_equal(mask, reference.mask(reference.scores(W, F), 0.55))
    close(new, reference.joint_minimum(W, F, np.asarray(mask)), 1e-10)


F32 = np.ones((4, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: fo.compression.obert(W, GRADS[0], 0.5), r"needs gradients of \('m', 6, 5\), m of them; got \(6, 5\)"),
        (lambda: fo.compression.obert(W, GRADS[:0], 0.5), r"m of them; got \(0, 6, 5\)"),
        (lambda: fo.compression.obert(W, GRADS * np.inf, 0.5), "1200 of 1200 entries of the gradients are not finite"),
        (lambda: fo.compression.obert(W, GRADS, 0.5, 0), "block must be a whole number of at least 1; got 0"),
        (lambda: fo.compression.obert(W, GRADS, 0.5, recomputations=0), "recomputations must be a whole number"),
        (lambda: fo.compression.obert(W, GRADS, 0.5, damping=-1.0), r"damping must be at least 0; got -1\.0"),
        (lambda: fo.compression.obert(W, GRADS, "4:4:2"), "sparsity must be a share"),
        (lambda: fo.compression.obert(W, GRADS, "2:4"), "groups of 4; this kernel has 6"),
        (lambda: fo.compression.obert(W, GRADS, 0.5, scope="row"), "scope must be one of"),
        (
            lambda: fo.compression.obert_step(jnp.ones((7, 5)), F32, jnp.isfinite),
            r"F \(4, 8, 8\) is not of a kernel",
        ),
        (
            lambda: fo.compression.obert_step(jnp.ones((6, 5)), F32 * np.nan, jnp.isfinite),
            "entries of F are not finite",
        ),
    ],
)
def test_errors(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
