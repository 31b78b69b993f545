"""Groups keep totals; a shift is found where there is one, at the rate asked for; the penalty is its quadratic."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fisher_optax as fo
from fisher_optax.fisher.diagonals.groups import grouping
from tests.reference.diagonal import weighted


class Attentive(nn.Module):
    """Every kind of leaf that groups know."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(7, 6, name="embed")(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12, name="attention")(
            nn.LayerNorm(name="norm")(x)
        )
        return nn.Dense(7, name="head")(nn.Conv(6, (3,), name="conv")(x))


@pytest.fixture(scope="module")
def squares() -> Any:
    """A tree like the model's parameters, of positive numbers."""
    params = jax.eval_shape(Attentive().init, jax.random.key(0), jnp.zeros((2, 5), int))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.uniform(size=x.shape), jnp.float32), params)


def total(tree: Any) -> float:
    return float(sum(np.sum(np.asarray(x), dtype=np.float64) for x in jax.tree.leaves(tree)))


@pytest.mark.parametrize("groups", (None, "parameter", "rows", "heads", "tensor", "blocks", "callable"))
def test_groups_conserve_the_total(squares: Any, groups: Any) -> None:
    groups = (lambda path, x: jnp.sum(x, 0) if path.endswith("kernel") else x) if groups == "callable" else groups
    assert total(grouping(groups, squares)(squares)) == pytest.approx(total(squares), rel=1e-6)


def test_each_group_is_the_sum_that_its_name_says(squares: Any) -> None:
    rows, heads = grouping("rows", squares)(squares), grouping("heads", squares)(squares)
    sums = lambda x, *axes: np.sum(np.asarray(x), axes)  # noqa: E731
    query, out = squares["attention"]["query"], squares["attention"]["out"]
    for found, wanted in (
        (rows["embed"]["embedding"], sums(squares["embed"]["embedding"], 1)),  # by token
        (rows["head"]["kernel"], sums(squares["head"]["kernel"], 0)),  # by output, a token too
        (rows["conv"]["kernel"], sums(squares["conv"]["kernel"], 0, 1)),
        (rows["attention"]["query"]["kernel"], sums(query["kernel"], 0)),
        (rows["norm"]["scale"], squares["norm"]["scale"]),
        (heads["attention"]["query"]["kernel"], sums(query["kernel"], 0, 2)),
        (heads["attention"]["query"]["bias"], sums(query["bias"], 1)),
        (heads["attention"]["out"]["kernel"], sums(out["kernel"], 1, 2)),
        (heads["attention"]["out"]["bias"], sums(out["bias"], 0)),
        (heads["conv"]["kernel"], sums(squares["conv"]["kernel"], 0, 1, 2)),
        (grouping("tensor", squares)(squares)["norm"]["scale"], sums(squares["norm"]["scale"], 0)),
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    blocks = grouping("blocks", squares)({"params": squares})
    assert set(blocks) == {"embed", "attention", "norm", "conv", "head"}
    assert float(blocks["attention"]) == pytest.approx(total(squares["attention"]), rel=1e-6)


def seen(x: np.ndarray, w: Any = None) -> Any:
    w = jnp.ones(len(x)) if w is None else jnp.asarray(w, jnp.float32)
    return fo.fisher.DiagonalFisher.zeros({"w": jnp.zeros(x.shape[1:])}).update({"w": jnp.asarray(x)}, w)


@pytest.mark.usefixtures("x64")
def test_a_shift_is_welchs_test_of_shares() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.chisquare(3, (20, 5)), 7 * rng.chisquare(3, (30, 5))
    wa, wb = rng.integers(1, 5, 20), rng.integers(1, 9, 30)
    shift = fo.fisher.importance_shift(seen(a, wa), seen(b, wb))
    sides = [weighted(x / weighted(x, w)[0].sum(), w) for x, w in ((a, wa), (b, wb))]
    (m1, v1, n1), (m2, v2, n2) = sides
    wanted = scipy.stats.ttest_ind_from_stats(m2, np.sqrt(v2), n2, m1, np.sqrt(v1), n1, equal_var=False)
    np.testing.assert_allclose(shift.z["w"], wanted.statistic, rtol=1e-9)
    np.testing.assert_allclose(shift.p["w"], wanted.pvalue, rtol=1e-6)
    np.testing.assert_allclose(shift.difference["w"], m2 - m1, rtol=1e-9)
    np.testing.assert_allclose(shift.ratio["w"], m2 / m1, rtol=1e-9)
    np.testing.assert_allclose(shift.effect["w"], (m2 - m1) / np.sqrt((v1 + v2) / 2), rtol=1e-9)
    order = np.argsort(wanted.pvalue)
    below = np.flatnonzero(np.sort(wanted.pvalue) <= 0.05 * np.arange(1, 6) / 5)
    assert set(np.flatnonzero(shift.significant["w"])) == set(order[: below[-1] + 1] if len(below) else [])


def test_false_discoveries_stay_below_the_rate_and_real_shifts_are_found() -> None:
    """50 groups of 300 gain what 50 others lose, so that the shares of the rest are as they were."""
    rng = np.random.default_rng(1)
    scale = np.concatenate([np.full(50, 1.75), np.full(50, 0.25), np.ones(200)])
    false, found = [], []
    for _ in range(20):
        a, b = rng.chisquare(8, (60, 300)), rng.chisquare(8, (60, 300)) * scale
        called = fo.fisher.importance_shift(seen(a.astype(np.float32)), seen(b.astype(np.float32))).significant["w"]
        false.append(np.sum(called[100:]) / np.sum(called))
        found.append(np.mean(called[:100]))
    assert np.mean(false) <= 0.05
    assert np.mean(found) >= 0.95


def test_groups_without_any_spread_agree_or_not() -> None:
    a = np.array([[1.0, 0.0, 3.0], [1.0, 0.0, 3.0]], np.float32)
    b = np.array([[2.0, 0.0, 2.0], [2.0, 0.0, 2.0]], np.float32)
    shift = fo.fisher.importance_shift(seen(a), seen(b))
    assert list(shift.p["w"]) == [0, 1, 0]
    assert list(shift.significant["w"]) == [True, False, True]
    assert np.isnan(shift.ratio["w"][1])
    assert not np.any(fo.fisher.importance_shift(seen(a), seen(a)).significant["w"])


def test_what_cannot_be_compared_is_said() -> None:
    two = seen(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="the second Fisher has 1 examples: a test needs the spread of two"):
        fo.fisher.importance_shift(two, seen(np.ones((1, 3), np.float32)))
    with pytest.raises(ValueError, match=r"the first Fisher has trace 0\.0"):
        fo.fisher.importance_shift(seen(np.zeros((2, 3), np.float32)), two)
    with pytest.raises(ValueError, match="two Fishers of different groups"):
        fo.fisher.importance_shift(two, seen(np.ones((2, 4), np.float32)))
    with pytest.raises(ValueError, match=r"rate must lie between 0 and 1, as 0\.05; got 5"):
        fo.fisher.importance_shift(two, two, rate=5)


def test_the_penalty_is_the_quadratic_of_the_fisher() -> None:
    """Its gradient is λ F (θ - θ*); None is not held; the two tasks' quadratic losses meet at the joint minimum."""
    F, start = {"a": jnp.array([1.0, 4.0]), "b": None}, {"a": jnp.array([1.0, 2.0]), "b": jnp.ones(3)}
    penalty = fo.fisher.ewc_penalty(F, start, strength=2.0)
    θ = {"a": jnp.array([2.0, 0.0]), "b": jnp.zeros(3)}
    assert float(penalty(θ)) == 1 * 1 + 4 * 4
    gradient = jax.grad(penalty)(θ)
    np.testing.assert_allclose(gradient["a"], 2 * F["a"] * (θ["a"] - start["a"]))
    assert not np.any(gradient["b"])
    fisher = seen(np.array([[1.0, 4.0], [1.0, 4.0]], np.float32))
    joint = (fisher.mean["w"] * 1.0 + jnp.array([3.0, 1.0]) * 5.0) / (fisher.mean["w"] + jnp.array([3.0, 1.0]))
    of_two = fo.fisher.ewc_penalty(fisher, {"w": jnp.ones(2)})
    both = lambda w: of_two({"w": w}) + 0.5 * jnp.sum(jnp.array([3.0, 1.0]) * jnp.square(w - 5))  # noqa: E731
    np.testing.assert_allclose(jax.grad(both)(joint), 0, atol=1e-5)
    with pytest.raises(ValueError, match="ewc_penalty needs a Fisher by parameter"):
        fo.fisher.ewc_penalty(fisher, {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="ewc_penalty needs a Fisher by parameter"):
        fo.fisher.ewc_penalty(fisher, {"v": jnp.ones(2), "w": jnp.ones(2)})


class Stored:
    """One model, its kernels stored inputs first or outputs first, nested or flat, with a tied head or its own."""

    def __init__(self, *, turned: bool, tied: bool):
        rng = np.random.default_rng(5)
        normal = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
        turn = jnp.transpose if turned else jnp.asarray
        self.turned, self.tied = turned, tied
        self.params: Any = {"wte": normal(9, 6), "square": turn(normal(6, 6)), "h.0.fc": turn(normal(6, 4))}
        self.params |= {"out": {"proj": turn(normal(4, 6))}, "norm": normal(6)}
        self.params |= {} if tied else {"readout": turn(normal(6, 9))}

    def loss(self, p: Any, example: Any) -> Any:
        turn = jnp.transpose if self.turned else jnp.asarray
        x = jnp.tanh(p["wte"][example[0]] @ turn(p["square"])) * p["norm"]
        x = jnp.tanh(x @ turn(p["h.0.fc"])) @ turn(p["out"]["proj"])
        return fo.losses.softmax_cross_entropy(x @ (p["wte"].T if self.tied else turn(p["readout"])), example[1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_units_however_a_kernel_is_stored(tied: bool) -> None:
    """As the program uses it: by token of a table and of a head, by output of a square matrix too."""
    rng = np.random.default_rng(6)
    batch = tuple(jnp.asarray(rng.integers(0, 9, (5, 7))) for _ in range(2))
    for turned in (False, True):
        model = Stored(turned=turned, tied=tied)
        squared, rows = (fo.fisher.diagonal(model.loss, model.params, [batch], groups=g).mean for g in (None, "rows"))
        other = 1 if turned else 0
        wanted = {
            "wte": squared["wte"].sum(1),
            "square": squared["square"].sum(other),
            "h.0.fc": squared["h.0.fc"].sum(other),
            "out": {"proj": squared["out"]["proj"].sum(other)},
            "norm": squared["norm"],
        }
        wanted |= {} if tied else {"readout": squared["readout"].sum(other)}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), rows, wanted)
        assert rows["wte"].shape == (9,)


def test_what_the_program_does_not_show_goes_by_the_rules_or_is_named() -> None:
    """A kernel by its name; a leaf without one, with a warning; what rules know nothing of, by entry."""
    params = {
        "kernel": jnp.ones((3, 4)),
        "plain": jnp.ones((3, 4)),
        "deep": jnp.ones((2, 3, 4)),
        "steps": jnp.arange(3),
    }

    def loss(p: Any, example: Any) -> Any:
        return jnp.sum(jnp.square(p["kernel"] * p["plain"] * p["deep"][0] * p["deep"][1] * example * p["steps"][0]))

    x = [jnp.ones((2, 3, 4))]
    with pytest.warns(
        UserWarning, match=r"by 2 leaves as they are.*'deep' of.*'plain' of shape \(3, 4\).*axes="
    ) as found:
        rows = fo.fisher.diagonal(loss, params, x, groups="rows").mean
    assert len(found) == 1
    assert {name: np.shape(x) for name, x in rows.items()} == {
        "kernel": (4,),
        "plain": (4,),
        "deep": (2, 3, 4),
        "steps": (),
    }
    assert rows["steps"] is None
    axes = {"kernel": None, "plain": fo.MatrixAxes(1, 0), "deep": fo.MatrixAxes(1, 2, 0), "steps": None}
    rows = fo.fisher.diagonal(loss, params, x, groups="rows", axes=lambda _: axes).mean
    assert (rows["plain"].shape, rows["deep"].shape) == ((3,), (2, 4))
