"""The mask engine against NumPy's lexsort: exactly k, ties by index, every scope, N of each M."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from fisher_optax.compression.matrix.masks import count, keep_largest
from tests.reference import pruning_scores as reference

RNG = np.random.default_rng(0)
# Few different values, so that most scores are tied; and all different.
TIED, DISTINCT = RNG.integers(0, 3, (12, 5)).astype(np.float32), RNG.standard_normal((12, 5)).astype(np.float32)
PATTERNS = {"2:4": (2, 4), "5:6": (5, 6)}

STACKS = [np.stack([x, x[::-1], -x]) for x in (TIED, DISTINCT)]

traced = jax.jit(fo.compression.mask, static_argnames="scope")
traced_global = jax.jit(fo.compression.global_masks)


@pytest.mark.parametrize("scope", ["matrix", "output"])
@pytest.mark.parametrize("stack", STACKS, ids=["ties", "distinct"])
def test_shares_follow_the_order_of_score_and_index(stack: np.ndarray, scope: str) -> None:
    """With a share that is given and one that is traced, each matrix of a stack by itself."""
    for share in (0.0, 0.1, 0.55, 0.999):
        np.testing.assert_array_equal(traced(stack, share, scope=scope), reference.mask(stack, share, scope))
    given = fo.compression.mask(jnp.asarray(stack), 0.55, scope)
    np.testing.assert_array_equal(given, reference.mask(stack, 0.55, scope))
    np.testing.assert_array_equal(fo.compression.mask(jnp.asarray(stack[1]), 0.55, scope), given[1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_keep_n_of_every_m_inputs(pattern: str) -> None:
    keep, of = PATTERNS[pattern]
    for stack in STACKS:
        stays = np.asarray(fo.compression.mask(jnp.asarray(stack), pattern))
        np.testing.assert_array_equal(stays, reference.mask(stack, PATTERNS[pattern]))
        np.testing.assert_array_equal(stays.reshape(3, -1, of, 5).sum(2), keep)


@pytest.mark.parametrize("n", [100, 1000, 999_999])
def test_counts_are_those_of_the_decimal_number(n: int) -> None:
    """0.55 times 100 is above 55 in floating point, and 0.07 times 100 above 7."""
    for share in (0.07, 0.1, 0.29, 0.3, 0.55, 0.57, 0.7, 0.9, 0.999):
        assert count(share, n) == reference.count(share, n)
    if n <= 1000:
        shares = (0.07, 0.55, 0.57)
        assert [int(count(jnp.float32(s), n)) for s in shares] == [reference.count(s, n) for s in shares]


def test_ties_go_to_the_lower_index() -> None:
    stays = fo.compression.mask(jnp.zeros((3, 4)), 0.5)
    np.testing.assert_array_equal(stays, np.arange(12).reshape(3, 4) >= 6)


def test_nan_counts_as_the_largest_score() -> None:
    stays = fo.compression.mask(jnp.array([[np.nan, 1.0, np.inf]]), 0.5)
    np.testing.assert_array_equal(stays, [[True, False, False]])


def test_global_masks_count_over_all_leaves() -> None:
    """In the order of the leaves, whatever their shapes; None passes."""
    scores = TIED
    tree = {"a": scores[:3], "b": [None, scores[3:].reshape(9, 5, 1)], "c": scores[0, 0]}
    flat = np.concatenate([scores.ravel(), scores[0, :1]])
    wanted = reference.keep(flat, reference.count(0.55, flat.size))
    for masks in (fo.compression.global_masks(tree, 0.55), traced_global(tree, 0.55)):
        assert masks["b"][0] is None
        assert masks["b"][1].shape == (9, 5, 1)
        np.testing.assert_array_equal(np.concatenate([np.ravel(x) for x in jax.tree.leaves(masks)]), wanted)
    assert fo.compression.global_masks({"a": None}, 0.5) == {"a": None}


@pytest.mark.parametrize(
    ("sparsity", "error", "match"),
    [
        (1.0, ValueError, r"at least 0 and below 1, .* got 1\.0"),
        (-0.1, ValueError, r"got -0\.1"),
        (float("nan"), ValueError, "got nan"),
        ("4:2", ValueError, "'4:2'"),
        ("0:4", ValueError, "'0:4'"),
        ("2-4", ValueError, "'N:M' to keep N .* got '2-4'"),
        (True, TypeError, "got True"),
        (np.array([0.5]), TypeError, "a share of weights"),
    ],
)
def test_what_is_no_sparsity(sparsity: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fo.compression.mask(jnp.ones((4, 2)), sparsity)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"2:4 needs inputs in groups of 4; this kernel has 6"):
        fo.compression.mask(jnp.ones((6, 4)), "2:4")
    with pytest.raises(ValueError, match="scope must be one of 'matrix', 'output'; got 'row'"):
        fo.compression.mask(jnp.ones((4, 2)), 0.5, "row")
    with pytest.raises(ValueError, match="by output, not over all layers"):
        fo.compression.global_masks({"a": jnp.ones(4)}, "2:4")


@pytest.mark.parametrize("axis", [0, -1, None])
def test_the_smallest_are_those_of_a_stable_sort(axis: int | None) -> None:
    """With ties, zeros of both signs, subnormal numbers and infinities; NaN counts as the largest."""
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (9, 5)).astype(np.float32)
    x[0, 0], x[3, 1], x[8, 2], x[1, 1], x[4, :2], x[5, 3] = np.nan, np.inf, 1e-40, -np.inf, 0.5, -0.0
    find = jax.jit(lambda x, k: keep_largest(x, k, axis))
    for k in (0, 1, 4, 5) if axis is not None else (0, 7, 22, 45):
        order = np.argsort(x, axis=axis, kind="stable")
        wanted = np.ones(order.shape, bool)
        gone = order[:k] if axis != -1 else order[:, :k]
        np.put_along_axis(wanted, gone, False, axis=0 if axis is None else axis)
        np.testing.assert_array_equal(find(x, k), wanted.reshape(x.shape))


def test_another_share_compiles_nothing() -> None:
    """Nor does a call that is not jitted, again and again."""
    scores = jnp.asarray(DISTINCT)
    fo.compression.mask(scores, 0.5)
    before = keep_largest._cache_size()
    for share in (0.5, 0.2, 0.7):
        fo.compression.mask(scores, share)
    assert keep_largest._cache_size() == before
