"""Fishers of a softmax head against enumerated labels and dense solves; merged, compressed, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax.fisher.head.empirical import EmpiricalHead
from fisher_optax.fisher.head.softmax import SoftmaxHead
from tests.reference import softmax_head as reference
from tests.reference.curvature import relative

SMALL = (7, 5)  # tokens, words
SKETCHES = ("subsample", "frequent_directions")


def small(seed: int = 0, shape: tuple[int, int] = SMALL) -> tuple[np.ndarray, np.ndarray]:
    """Logits of any confidence, and weights of which one is 0."""
    rng = np.random.default_rng(seed)
    w = rng.uniform(0.1, 2, shape[0])
    w[-1] = 0
    return 3 * rng.standard_normal(shape), w


def with_nan(z: np.ndarray) -> np.ndarray:
    """The same logits with NaN at the token of weight 0."""
    return np.vstack([z[:-1], np.full_like(z[:1], np.nan)])


@pytest.mark.usefixtures("x64")
def test_dense_is_the_sum_over_labels() -> None:
    z, w = small()
    P = reference.softmax(z)
    np.testing.assert_allclose(SoftmaxHead.from_logits(z).dense(), reference.fisher(P, np.ones(len(z))), atol=1e-14)
    np.testing.assert_allclose(SoftmaxHead.from_logits(with_nan(z), w).dense(), reference.fisher(P, w), atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("max_rows", [None, 3, 1])
@pytest.mark.parametrize("sketch", SKETCHES)
def test_matvec_and_solve_are_those_of_dense(sketch: str, max_rows: int | None) -> None:
    z, w = small()
    head = SoftmaxHead.from_logits(with_nan(z), w).compress(max_rows, sketch)
    Y = np.random.default_rng(1).standard_normal((SMALL[1], 3))
    G = np.asarray(head.dense())
    np.testing.assert_allclose(head.matvec(Y), G @ Y, atol=1e-14)
    np.testing.assert_allclose(head.matvec(Y[:, 0]), G @ Y[:, 0], atol=1e-14)
    for damping in (1e-6, 0.1, 10.0):
        inverse = np.linalg.inv(G + damping * np.eye(len(G)))
        np.testing.assert_allclose(head.solve(Y, damping), inverse @ Y, rtol=1e-8)
        np.testing.assert_allclose(head.solve(Y[:, 0], damping, zero_sum=True), inverse @ (Y[:, 0] - Y[:, 0].mean()))


@pytest.mark.usefixtures("x64")
def test_diagonal_is_the_sum_over_labels_and_hidden_states() -> None:
    z, w = small()
    h = np.random.default_rng(2).standard_normal((len(z), 4))
    wanted = reference.kernel_diagonal(reference.softmax(z), w, h)
    empty = np.vstack([h[:-1], np.full_like(h[:1], np.nan)])
    head = SoftmaxHead.from_logits(with_nan(z), w)
    np.testing.assert_allclose(head.diagonal(empty), wanted, rtol=1e-12)
    np.testing.assert_allclose(head.row_scores(empty), wanted.sum(1), rtol=1e-12)


def test_the_diagonal_of_a_certain_token_keeps_its_digits_in_float32() -> None:
    """``p (1 - p)`` of a word whose p is 1 in float32."""
    z = np.array([[20.0, 0.0, 1.0]])
    wanted = reference.kernel_diagonal(reference.softmax(z), [1.0], np.ones((1, 1)))
    np.testing.assert_allclose(SoftmaxHead.from_logits(z.astype(np.float32)).diagonal(np.ones((1, 1))), wanted, 2e-6)


def test_a_whole_vocabulary_is_solved_within_three_gigabytes() -> None:
    """50,257 words, 1,024 tokens, 768 features, from logits to solution."""
    z, Y, λ = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1024, 50257), (50257, 768), ()))
    solved = jax.jit(lambda z, Y, λ: SoftmaxHead.from_logits(z).solve(Y, λ, zero_sum=True)).lower(z, Y, λ).compile()
    used: Any = solved.memory_analysis()
    assert used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes < 3e9


def test_one_program_for_every_damping_and_every_head_of_a_shape() -> None:
    solved: Any = jax.jit(lambda head, Y, damping: head.solve(Y, damping))
    for seed in range(3):
        z, _ = small(seed)
        head, Y = SoftmaxHead.from_logits(z.astype(np.float32)), np.ones(SMALL[1], np.float32)
        np.testing.assert_allclose(solved(head, Y, 10.0**-seed), head.solve(Y, 10.0**-seed), rtol=1e-6)
    assert solved._cache_size() == 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("signed", [False, True])
def test_merging_is_exact_in_either_order(signed: bool) -> None:
    (z, w), (other, v) = small(), small(1, (4, SMALL[1]))
    a, b = SoftmaxHead.from_logits(z, w), SoftmaxHead.from_logits(other, v)
    if signed:
        a = a.compress(len(z) - 1, "frequent_directions")
    whole = reference.fisher(reference.softmax(np.vstack([z, other])), np.append(w, v))
    for merged in (a.merge(b), b.merge(a)):
        np.testing.assert_allclose(merged.dense(), whole, atol=1e-14)
        np.testing.assert_allclose(merged.total, w.sum() + v.sum())
    if not signed:
        h = np.random.default_rng(0).standard_normal((11, 2))
        wanted = reference.kernel_diagonal(reference.softmax(np.vstack([z, other])), np.append(w, v), h)
        np.testing.assert_allclose(a.merge(b).diagonal(h), wanted, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sketch", SKETCHES)
@pytest.mark.parametrize("max_rows", [1, 4])
def test_compression_only_adds_and_keeps_the_mean_and_the_null_vector(sketch: str, max_rows: int) -> None:
    z, w = small(0, (20, 9))
    head = SoftmaxHead.from_logits(z, w)
    less, G = head.compress(max_rows, sketch), np.asarray(head.dense())
    added = np.linalg.eigvalsh(np.asarray(less.dense()) - G)
    assert len(less.rows) == max_rows
    assert added[0] > -1e-14
    assert added[-1] > 1e-3
    np.testing.assert_allclose(less.dense().sum(0), 0, atol=1e-14)
    np.testing.assert_allclose(less.mean, head.mean, atol=1e-14)
    if sketch == "frequent_directions":
        s = reference.shares(w)
        σ = np.linalg.svd(np.sqrt(s)[:, None] * (reference.softmax(z) - s @ reference.softmax(z)), compute_uv=False)
        np.testing.assert_allclose(added[-1], σ[max_rows] ** 2)
    assert head.compress(20, sketch) is head.compress(None, sketch) is head


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sketch", SKETCHES)
def test_a_stream_of_batches_takes_bounded_memory(sketch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, compress = [], SoftmaxHead.compress

    def watched(head: SoftmaxHead, *args: Any) -> SoftmaxHead:
        seen.append(len(head.rows))
        return compress(head, *args)

    monkeypatch.setattr(SoftmaxHead, "compress", watched)
    batches = [small(seed, (10, 9)) for seed in range(6)]
    head = SoftmaxHead.from_batches(iter(batches), 12, sketch)
    assert max(seen) <= 12 + 10 + 1
    assert len(head.rows) == 12
    z, w = (np.concatenate(x) for x in zip(*batches, strict=True))
    G = reference.fisher(reference.softmax(z), w)
    assert np.linalg.eigvalsh(np.asarray(head.dense()) - G)[0] > -1e-14
    assert relative(head.dense(), G) < 0.5
    unlimited = SoftmaxHead.from_batches([jnp.asarray(z) for z, _ in batches])
    np.testing.assert_allclose(unlimited.dense(), reference.fisher(reference.softmax(z), np.ones(60)), atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_signed_rows_can_be_subsampled() -> None:
    head = SoftmaxHead.from_logits(small(0, (20, 9))[0]).compress(8, "frequent_directions")
    less = head.compress(3)
    assert np.linalg.eigvalsh(np.asarray(less.dense() - head.dense()))[0] > -1e-14
    assert len(less.rows) == 3


def test_what_is_not_finite_and_what_weighs_nothing_stays_out_under_jit() -> None:
    z, w = small()
    z = z.astype(np.float32)
    clean = SoftmaxHead.from_logits(z[1:-1]).dense()
    z[0, 2], z[-1] = np.nan, np.inf
    np.testing.assert_allclose(SoftmaxHead.from_logits(z).dense(), clean, atol=1e-7)
    of_nothing = jax.jit(SoftmaxHead.from_logits)(z, -w)
    np.testing.assert_array_equal(of_nothing.dense(), 0)
    for head in (of_nothing, of_nothing.compress(3, "frequent_directions"), of_nothing.merge(of_nothing, 2)):
        np.testing.assert_allclose(head.solve(jnp.arange(5.0), 0.5), 2 * jnp.arange(5.0), rtol=1e-6)
        assert np.isfinite(head.condition(0.5))


@pytest.mark.usefixtures("x64")
def test_the_empirical_head() -> None:
    """Its entries, solve, merging and compression against sums over the labels that occurred."""
    z, w = small(0, (12, 6))
    labels, Y = np.arange(12) % 6, np.random.default_rng(3).standard_normal((6, 2))
    G = reference.empirical(reference.softmax(z), labels, w)
    labels[-1] = -100
    head = EmpiricalHead.from_logits(with_nan(z), labels, w)
    np.testing.assert_allclose(head.dense(), G, atol=1e-14)
    np.testing.assert_allclose(head.matvec(Y), G @ Y, atol=1e-14)
    np.testing.assert_allclose(head.solve(Y, 1e-3), np.linalg.solve(G + 1e-3 * np.eye(6), Y), rtol=1e-9)
    parts = [EmpiricalHead.from_logits(z[i], labels[i], w[i]) for i in (slice(5), slice(5, 11))]
    np.testing.assert_allclose(parts[0].merge(parts[1]).dense(), G, atol=1e-14)
    lost = np.linalg.eigvalsh(G - np.asarray(parts[0].merge(parts[1], 3).dense()))
    assert lost[0] > -1e-14
    np.testing.assert_allclose(lost[-1], np.linalg.eigvalsh(G)[-4])
    g = reference.softmax(z) - np.eye(6)[labels % 6]
    np.testing.assert_allclose(EmpiricalHead.from_gradients(g, w).dense(), G, atol=1e-14)
    outside = jax.jit(EmpiricalHead.from_logits)(z, np.where(np.arange(12) == 3, 6, labels % 6), w)
    w[3] = 0
    np.testing.assert_allclose(outside.dense(), reference.empirical(reference.softmax(z), labels % 6, w), atol=1e-14)


def test_the_empirical_head_of_few_directions_solves_in_float32() -> None:
    """Equal gradients, whose Gram matrix is singular to the last digit."""
    g = np.tile(np.array([[1.0, -1.0, 0.0]], np.float32), (8, 1))
    x = EmpiricalHead.from_gradients(g).solve(jnp.array([0.0, 0.0, 1.0]), 1e-8)
    np.testing.assert_allclose(x, [0, 0, 1e8], rtol=1e-6)


ERRORS = {
    r"got logits \(7, 5\), weights \(3,\); wanted \(\*positions, vocabulary\)": lambda z, h: SoftmaxHead.from_logits(
        z, np.ones(3)
    ),
    "weights must be finite and at least 0; got -1": lambda z, h: SoftmaxHead.from_logits(z, -np.ones(7)),
    "weights must be finite and at least 0; got inf": lambda z, h: SoftmaxHead.from_logits(z, np.full(7, np.inf)),
    "no token counts": lambda z, h: SoftmaxHead.from_logits(z, np.zeros(7)),
    "got no batch": lambda z, h: SoftmaxHead.from_batches([]),
    r"got Y of shape \(6,\); wanted \(5, features\)": lambda z, h: h.matvec(np.ones(6)),
    "damping must be one finite number above 0; got 0": lambda z, h: h.solve(np.ones(5), 0),
    "damping must be one finite number above 0; got nan": lambda z, h: h.condition(float("nan")),
    "sketch must be one of 'subsample', 'frequent_directions'; got 'svd'": lambda z, h: h.merge(h, 3, "svd"),
    "max_rows must be None or an integer of at least 1; got 0": lambda z, h: h.compress(0),
    "vocabularies of 5 and 4 words": lambda z, h: h.merge(SoftmaxHead.from_logits(z[:, 1:])),
    "diagonal of each batch's own head": lambda z, h: h.compress(3).diagonal(np.ones((3, 2))),
    r"got hidden of shape \(6, 2\); wanted .* of 7 tokens": lambda z, h: h.row_scores(np.ones((6, 2))),
    "got label 5; wanted 0 to 4, or weight 0": lambda z, h: EmpiricalHead.from_logits(z, np.full(7, 5)),
    r"got labels float.* \(7,\); wanted integers \(7,\)": lambda z, h: EmpiricalHead.from_logits(z, np.ones(7)),
    "EmpiricalHead.solve: damping": lambda z, h: EmpiricalHead.from_gradients(z).solve(np.ones(5), -1.0),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_came_and_what_was_wanted(message: str) -> None:
    z = small()[0].astype(np.float32)
    with pytest.raises(ValueError, match=message):
        ERRORS[message](z, SoftmaxHead.from_logits(z))
