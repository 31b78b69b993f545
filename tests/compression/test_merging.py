"""Merging: minimisers of quadratic losses, fallbacks where nothing is known, task vectors against NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fisher_optax.compression import Merged, add_task_vectors, dare, merge, task_vector, ties
from fisher_optax.fisher import DiagonalFisher, Operator
from tests.reference import merging as reference

D = 14  # numbers of a model


def as_tree(x: Any) -> dict[str, Any]:
    """(14,) as a Dense layer."""
    x = jnp.asarray(x)
    return {"dense": {"bias": x[:2], "kernel": x[2:].reshape(6, 2)}}


def as_vector(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def models(n: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """θ and diagonal Fishers; the last two entries have none, and of two more all but one model's are 0."""
    rng = np.random.default_rng(0)
    θ, F = rng.normal(size=(n, D)), rng.exponential(size=(n, D)) ** 2
    F[:, -2:] = F[1:, 2:4] = 0
    return θ, F


@pytest.fixture
def hessians() -> tuple[np.ndarray, np.ndarray]:
    """θ and dense Fishers of full rank together."""
    rng = np.random.default_rng(1)
    R = rng.normal(size=(3, 9, D))
    return rng.normal(size=(3, D)), np.einsum("irj,irk->ijk", R, R)


C = np.array([1.0, 0.5, 2.0])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("fallback", ["average", "first"])
def test_diagonals_give_the_joint_minimiser(normalize: bool, fallback: str) -> None:
    """Σ c_i F_i (θ - θ_i) = 0, and the fallback by name, counted, where no model has any Fisher."""
    θ, F = models()
    trees, fishers = [as_tree(x) for x in θ], [as_tree(f) for f in F]
    found = merge(trees, fishers, coefficients=C, normalize=normalize, fallback=fallback)
    c = C / F.sum(1) if normalize else C
    otherwise = C @ θ / C.sum() if fallback == "average" else θ[0]
    x = as_vector(found.params)
    np.testing.assert_allclose(x, reference.diagonal_merge(θ, F, c, otherwise), rtol=0, atol=1e-13)
    np.testing.assert_allclose(np.einsum("i,ij,ij->j", c, F, x - θ), 0, atol=1e-12)
    assert jax.tree.map(int, found.fallbacks) == {"dense": {"bias": 0, "kernel": 2}}
    assert found.residual == 0


@pytest.mark.usefixtures("x64")
def test_operators_give_the_joint_minimiser_where_diagonals_do_not(hessians: tuple[np.ndarray, np.ndarray]) -> None:
    θ, A = hessians
    trees, like = [as_tree(x) for x in θ], as_tree(θ[0])
    F = [Operator.from_dense(a, like) for a in A]
    found = jax.jit(lambda F: merge(trees, F, coefficients=C, floor=0.0, tolerance=1e-13))(F)
    truth = reference.joint_minimiser(θ, A, C)
    np.testing.assert_allclose(as_vector(found.params), truth, rtol=0, atol=1e-8)
    assert found.fallbacks is None
    assert found.residual < 1e-12
    diagonals = [as_tree(np.diag(a)) for a in A]
    assert np.abs(as_vector(merge(trees, diagonals, coefficients=C).params) - truth).max() > 0.1
    # Of diagonal operators traces are exact, and scales are taken out as of diagonals.
    acting = [Operator.from_dense(np.diag(np.diag(a)), like) for a in A]
    ours = merge(trees, acting, normalize=True, floor=0.0, tolerance=1e-13)
    wanted = merge(trees, diagonals, normalize=True)
    np.testing.assert_allclose(as_vector(ours.params), as_vector(wanted.params), atol=1e-10)


def test_directions_without_curvature_keep_the_centre() -> None:
    """In float32, with Fishers of rank 3 and about 1e-30; a floor is a ridge of that share of the mean eigenvalue, as
    far as that is known from random products.
    """
    rng = np.random.default_rng(2)
    R = np.zeros((2, 3, D))
    R[:, :, :5] = rng.normal(size=(2, 3, 5))
    θ, A = rng.normal(size=(2, D)), np.einsum("irj,irk->ijk", R, R)
    trees, F = [as_tree(x) for x in θ], [Operator.from_dense(jnp.asarray(1e-30 * a), as_tree(θ[0])) for a in A]

    @functools.partial(jax.jit, static_argnums=1)
    def merged(floor: Any, fallback: str) -> Merged:
        return merge(trees, F, floor=floor, fallback=fallback)

    average = as_vector(merged(0.0, "average").params)
    np.testing.assert_allclose(average, reference.joint_minimiser(θ, A, np.ones(2)), atol=1e-4)
    np.testing.assert_allclose(average[5:], θ.mean(0)[5:], atol=1e-6)
    np.testing.assert_allclose(as_vector(merged(0.0, "first").params)[5:], θ[0, 5:], atol=1e-6)
    floor, (δ, total) = 0.1, (as_vector(merged(0.1, "average").params) - θ.mean(0), A.sum(0))
    pull = np.einsum("ijk,ik->j", A, θ - θ.mean(0)) - total @ δ  # ρ δ
    ρ = pull @ δ / (δ @ δ)
    np.testing.assert_allclose(pull, ρ * δ, atol=1e-4)
    assert 0.7 < ρ / (floor * np.trace(total) / D) < 1.4


def test_unknown_leaves_and_small_numbers() -> None:
    """None is the fallback for a whole leaf; Fishers of 1e-30 and of bfloat16 models are as good as others; what all
    agree on stays as it is; a floor decides by shares of the mean."""
    θ, F = models(2)
    trees, given = [as_tree(x) for x in θ], [as_tree(1e-30 * f) for f in F]
    exact = as_vector(merge(trees, [as_tree(f) for f in F]).params)
    np.testing.assert_allclose(as_vector(jax.jit(merge)(trees, given).params), exact, rtol=1e-5, atol=1e-6)
    given[1]["dense"]["bias"] = None
    found = merge(trees, given)
    assert int(found.fallbacks["dense"]["bias"]) == 2
    np.testing.assert_allclose(found.params["dense"]["bias"], θ[:, :2].mean(0), rtol=1e-6)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trees)
    assert merge(low, given).params["dense"]["kernel"].dtype == jnp.bfloat16
    same = merge([low[0]] * 2, given, coefficients=(0.3, 0.7)).params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), same, low[0]))
    wide = [{"w": jnp.array([1.0, 1e-4])}, {"w": jnp.array([1.0, 3e-4])}]
    ends = [{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}]
    for floor, wanted in ((1e-6, 0.75), (1e-3, 0.5)):
        found = merge(ends, wide, floor=floor)
        assert float(found.params["w"][1]) == pytest.approx(wanted, rel=1e-5)


def test_diagonal_fishers_are_their_means() -> None:
    F = [DiagonalFisher.zeros(jnp.zeros(2)).update(jnp.array([[1.0, x]]), jnp.ones(1)) for x in (1.0, 3.0)]
    found = merge([jnp.zeros(2), jnp.ones(2)], F)
    np.testing.assert_allclose(found.params, [0.5, 0.75], rtol=1e-6)


def refused(*args: Any, **kwargs: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        merge(*args, **kwargs)
    return str(error.value)


def test_what_is_unknown_may_be_a_whole_branch() -> None:
    """None in the place of a subtree, and no entry at all for a collection beside "params": the fallback decides."""
    statistics = {"norm": {"mean": jnp.array([1.0, 3.0]), "var": jnp.ones(2)}}
    model = {"params": {"w": jnp.ones(2)}, "batch_stats": statistics}
    one, two = (jax.tree.map(lambda s, x=x: x * s, model) for x in (0.0, 2.0))
    known = [{"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([1.0, 3.0])}]
    trees = (
        [{"params": F} for F in known],
        [{"params": F, "batch_stats": None} for F in known],
        [{"params": F, "batch_stats": {"norm": None}} for F in known],
    )
    for fishers in trees:
        merged = merge([one, two], fishers)
        np.testing.assert_allclose(merged.params["params"]["w"], [0.5, 1.5])
        np.testing.assert_allclose(merged.params["batch_stats"]["norm"]["mean"], [1.0, 3.0])
        assert int(merged.fallbacks["batch_stats"]["norm"]["mean"]) == 2
    both = task_vector(one, two)
    np.testing.assert_allclose(
        add_task_vectors(one, [both], fishers=trees[1][:1])["batch_stats"]["norm"]["mean"], [2.0, 6.0]
    )
    assert "models[0] has 'batch_stats/norm/mean', which models[1] lacks" in refused(
        [one, {"params": two["params"]}], known
    )


def test_errors_of_merge_name_what_is_wrong() -> None:
    one, two = as_tree(np.ones(D)), as_tree(np.zeros(D))
    F = [one, one]
    assert "got 1 models and 2 Fishers" in refused([one], F)
    assert "models[1] lacks: give trees" in refused([one, {"dense": {"bias": jnp.ones(2)}}], F)
    assert "'dense/bias' is (3,) in models[1] and (2,) in models[0]" in refused(
        [one, {"dense": {**two["dense"], "bias": jnp.ones(3)}}], F
    )
    assert "'dense/bias' is float32 in models[0], int32 in models[1]" in refused(
        [one, jax.tree.map(lambda x: x.astype(int), two)], F
    )
    bad = {"dense": {**one["dense"], "bias": jnp.array([1.0, -1.0])}}
    assert "fishers[1] is negative at 'dense/bias'" in refused([one, two], [one, bad])
    bad = {"dense": {**one["dense"], "bias": jnp.array([1.0, jnp.nan])}}
    assert "fishers[1] at 'dense/bias' are not finite" in refused([one, two], [one, bad])
    assert "'dense/bias' of models[0] are not finite" in refused([bad, two], F)
    rows = {"dense": {**one["dense"], "kernel": jnp.ones(2)}}
    assert "fishers[1] has (2,) at 'dense/kernel', the parameter (6, 2)" in refused([one, two], [one, rows])
    assert "fishers[1] lacks 'dense/kernel', which" in refused([one, two], [one, {"dense": {"bias": jnp.ones(2)}}])
    assert "fishers[0] has 'head', which the models lack" in refused([one, two], [{**one, "head": jnp.ones(2)}, one])
    assert "fishers[0] has 'dense/gain', which" in refused([one, two], [{"dense": {**one["dense"], "gain": None}}, one])
    assert "got operators and diagonals" in refused([one, two], [one, Operator.from_dense(jnp.eye(D), one)])
    wrong = [Operator.from_dense(s * jnp.eye(D), one) for s in (1.0, -1.0)]
    assert "fishers[1] has trace -14" in refused([one, two], wrong)
    assert "must be 'average' or 'first'" in refused([one, two], wrong, fallback="raise")
    for coefficients in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, np.nan]):
        assert "coefficients" in refused([one, two], F, coefficients=coefficients)
    assert "floor" in refused([one, two], F, floor=1.0)
    assert "fallback must be one of 'average', 'first', 'raise'; got 'last'" in refused([one, two], F, fallback="last")
    none = {"dense": {**one["dense"], "bias": jnp.array([1.0, 0.0])}}
    assert "no model has any Fisher for 1 entries of 'dense/bias' (1 of 2" in refused(
        [one, two], [none, none], fallback="raise"
    )
    assert isinstance(merge([one, two], F, fallback="raise"), Merged)


def test_raise_is_refused_under_jit() -> None:
    one = jnp.ones(2)
    with pytest.raises(ValueError, match="under jit"):
        jax.jit(lambda x: merge([x, x], [x, x], fallback="raise").params)(one)


def test_what_is_no_fisher_counts_as_nothing_under_jit() -> None:
    F = jnp.array([[jnp.nan, -1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    found = jax.jit(lambda F: merge([jnp.zeros(4), jnp.ones(4)], list(F)).params)(F)
    np.testing.assert_allclose(found, [1.0, 1.0, 0.5, 0.5])


def test_task_arithmetic() -> None:
    """Plain sums with a scale a vector; with Fishers, shares that sum to 1, so that scale 1 is the merge."""
    θ, F = models()
    base = as_tree(np.ones(D))
    vectors = [task_vector(base, as_tree(x)) for x in θ]
    plain = add_task_vectors(base, vectors, scale=[0.5, 0.0, -1.0])
    np.testing.assert_allclose(as_vector(plain), 1 + np.array([0.5, 0.0, -1.0]) @ (θ - 1), atol=1e-6)
    fishers = [as_tree(f) for f in F]
    merged = merge([as_tree(x) for x in θ], fishers, floor=0.0).params
    np.testing.assert_allclose(
        as_vector(add_task_vectors(base, vectors, fishers=fishers)), as_vector(merged), atol=1e-6
    )
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    assert task_vector(half, half)["dense"]["bias"].dtype == jnp.float32
    assert add_task_vectors(half, vectors)["dense"]["bias"].dtype == jnp.bfloat16


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_papers_algorithm(density: float) -> None:
    """Of whole models, ties among magnitudes included."""
    τ = np.round(np.random.default_rng(3).normal(size=(3, D)), 1)
    kept = D - int(np.ceil((1 - density) * D))
    found = jax.jit(ties, static_argnums=2)(as_tree(np.ones(D)), [as_tree(t) for t in τ], density, 0.7)
    np.testing.assert_allclose(as_vector(found), 1 + 0.7 * reference.ties(τ, kept), atol=1e-6)


def test_dare_drops_a_share_and_keeps_the_mean() -> None:
    vector = {"a": jnp.full((100, 50), 3.0), "b": jnp.full(5000, -1.0)}
    thin = dare(jax.random.key(0), vector, 0.75)
    for name, x in vector.items():
        np.testing.assert_array_equal(np.unique(thin[name]), sorted([0.0, 4 * float(x.ravel()[0])]))
        kept = float((thin[name] != 0).mean())
        assert abs(kept - 0.25) < 4 * (0.25 * 0.75 / x.size) ** 0.5
        np.testing.assert_allclose(thin[name].mean() / x.mean(), 4 * kept, rtol=1e-5)
    assert not np.array_equal(np.ravel(thin["a"] != 0), thin["b"] != 0)


def test_errors_of_task_vectors_name_what_is_wrong() -> None:
    x = {"w": jnp.ones(2)}
    cases = (
        (lambda: task_vector(x, {"v": jnp.ones(2)}), "tuned has 'v', which base lacks"),
        (lambda: add_task_vectors(x, []), "got no task vectors"),
        (lambda: add_task_vectors(x, [x], scale=[1.0, 2.0]), "scale is a number or 1 of them"),
        (lambda: add_task_vectors(x, [x, x], fishers=[x]), "got 2 vectors and 1 Fishers"),
        (lambda: ties(x, [x, {"w": jnp.ones(3)}]), r"'w' is \(3,\) in vectors\[1\]"),
        (lambda: ties(x, [x], density=0.0), "density is the share that stays"),
        (lambda: dare(jax.random.key(0), x, 1.0), "p is a probability"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
