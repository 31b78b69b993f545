"""`fo.groups` is the `optax.partition` that one would write by hand, and misses no leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo

PARAMS = {
    "embed": {"embedding": jnp.ones((6, 3))},
    "mlp": {"kernel": jnp.full((3, 4), 0.5), "bias": jnp.ones(4)},
    "encoder": {"kernel": jnp.ones((3, 3))},
    "norm": {"scale": jnp.ones(3)},
}
RULES: list[Any] = [
    (r"embed/", optax.scale_by_adam(), 0.3),
    (r"mlp/kernel", fo.scale_by_muon(), 5.0, 0.1),
    {"pattern": r"encoder/", "method": None},
    (r".*", optax.scale_by_adam(b1=0.8), 1.0, fo.Decay(0.1, "independent", peak_learning_rate=0.2)),
]


def SCHEDULE(count: Any) -> Any:
    return 0.1 * 0.9**count


def drawn(seed: int, params: Any = PARAMS) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)


def run(tx: Any, steps: int = 4, params: Any = PARAMS) -> Any:
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(steps):
        updates, state = update(drawn(t, params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def by_hand() -> Any:
    labels = {
        "embed": {"embedding": "embed"},
        "mlp": {"kernel": "mlp", "bias": "rest"},
        "encoder": {"kernel": "frozen"},
        "norm": {"scale": "rest"},
    }
    decay = fo.add_decay(SCHEDULE, fo.Decay(0.1, "independent", peak_learning_rate=0.2))
    muon = fo.scale_by_muon(axes=jax.tree.map(lambda x: fo.MatrixAxes() if x.ndim == 2 else None, PARAMS))
    return optax.partition(
        {
            "embed": optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(lambda t: 0.3 * SCHEDULE(t))),
            "mlp": optax.chain(
                muon, optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(lambda t: 5.0 * SCHEDULE(t))
            ),
            "frozen": optax.set_to_zero(),
            "rest": optax.chain(optax.scale_by_adam(b1=0.8), optax.scale_by_learning_rate(SCHEDULE), decay),
        },
        labels,
    )


def test_groups_are_a_partition_by_hand() -> None:
    ours, wanted = run(fo.groups(SCHEDULE, RULES))[0], run(by_hand())[0]
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)


def test_the_first_rule_that_fits_wins() -> None:
    either = [("mlp", optax.identity()), ("kernel", None), (".*", None)]
    first, _ = run(fo.groups(0.1, either), 1)
    second, _ = run(fo.groups(0.1, [either[1], either[0], either[2]]), 1)
    assert np.any(first["mlp"]["kernel"] != PARAMS["mlp"]["kernel"])
    np.testing.assert_array_equal(second["mlp"]["kernel"], PARAMS["mlp"]["kernel"])
    assert np.any(second["mlp"]["bias"] != PARAMS["mlp"]["bias"])


def test_frozen_leaves_stay_and_have_no_state() -> None:
    params, state = run(fo.groups(0.1, [("mlp", optax.scale_by_adam()), (".*", None)]), 2)
    np.testing.assert_array_equal(params["encoder"]["kernel"], PARAMS["encoder"]["kernel"])
    assert {x.shape for x in jax.tree.leaves(state)} == {(), (3, 4), (4,)}


def test_independent_decay_does_not_know_the_factor() -> None:
    decay = fo.Decay(0.1, "independent", peak_learning_rate=0.2)
    zero = optax.set_to_zero()
    ends = [run(fo.groups(SCHEDULE, [(".*", zero, rate, decay)]), 3)[0] for rate in (1.0, 7.0)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *ends)
    assert np.all(ends[0]["norm"]["scale"] < 1)


def test_axes_are_read_off_the_whole_tree() -> None:
    """The stacked biases alone tell that the kernel is a stack of layers."""
    params = {"layers_of": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.ones((3, 5))}}
    rules = [("kernel", fo.scale_by_soap()), ("bias", optax.scale_by_adam())]
    (grouped,), (whole,) = (
        [row for row in fo.report(tx, params).rows if row.path == "layers_of/kernel"]
        for tx in (fo.groups(0.1, rules), fo.scale_by_soap())
    )
    assert grouped.axes == fo.MatrixAxes(1, 2, 0)
    assert (grouped.axes, grouped.reason) == (whole.axes, whole.reason)


def test_kinds_take_the_place_of_patterns() -> None:
    rules = [(fo.kind("matrix"), optax.scale_by_adam()), (fo.kind("embedding"), None), (".*", optax.identity())]
    report: Any = fo.report(fo.groups(0.1, rules), PARAMS)
    rows = {row.path: row.rule for row in report.rows}
    assert rows == {"embed/embedding": 1, "encoder/kernel": 0, "mlp/bias": 2, "mlp/kernel": 0, "norm/scale": 2}


def test_report_has_a_row_for_each_leaf() -> None:
    report: Any = fo.report(fo.groups(SCHEDULE, RULES), PARAMS)
    rows = {row.path: (row.rule, row.pattern, row.method, row.rate, row.decay) for row in report.rows}
    assert rows == {
        "embed/embedding": (0, "embed/", "scale_by_adam", 0.3, "0"),
        "encoder/kernel": (2, "encoder/", "frozen", None, ""),
        "mlp/bias": (3, ".*", "scale_by_adam", 1.0, "0.1 independent"),
        "mlp/kernel": (1, "mlp/kernel", "muon", 5.0, "0.1"),
        "norm/scale": (3, ".*", "scale_by_adam", 1.0, "0.1 independent"),
    }
    assert len(report.rows) == 5
    assert "0.1 independent" in str(report)


def test_init_is_traced_and_rates_are_injected() -> None:
    tx: Any = fo.groups(SCHEDULE, RULES)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, tx.init(PARAMS))
    rules = [("embed", None), (".*", optax.identity(), 2.0)]
    injected = optax.inject_hyperparams(fo.groups)(learning_rate=0.1, rules=rules)
    jax.tree.map(np.testing.assert_array_equal, run(injected)[0], run(fo.groups(0.1, rules))[0])


def test_a_gradient_that_is_not_finite_stops_every_group() -> None:
    tx: Any = fo.groups(SCHEDULE, RULES)
    state, grads = tx.init(PARAMS), drawn(0)
    grads["norm"]["scale"] = grads["norm"]["scale"].at[0].set(jnp.nan)
    updates, after = jax.jit(tx.update)(grads, state, PARAMS)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert fo.health(after).skipped >= 1
    jax.tree.map(np.testing.assert_array_equal, state.inner, after.inner)


def test_statistics_reach_kfac_in_a_group() -> None:
    params = {"mlp": PARAMS["mlp"], "norm": PARAMS["norm"]}

    def loss(params: Any, x: Any) -> Any:
        logits = (x * params["norm"]["scale"]) @ params["mlp"]["kernel"] + params["mlp"]["bias"]
        return fo.losses.softmax_cross_entropy(logits, jnp.arange(8) % 4)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    tx: Any = fo.groups(0.1, [("mlp", fo.scale_by_kfac()), (".*", None)])
    alone: Any = optax.chain(fo.scale_by_kfac(), optax.scale_by_learning_rate(0.1))
    _, grads, statistics = fo.value_and_grad(loss)(params, x)
    ours, wanted = (jax.jit(x.update)(grads, x.init(params), params, statistics=statistics)[0] for x in (tx, alone))
    np.testing.assert_array_equal(ours["mlp"]["kernel"], wanted["mlp"]["kernel"])


def test_a_frozen_leaf_stops_no_step() -> None:
    tx: Any = fo.groups(SCHEDULE, RULES)
    grads, update = drawn(0), jax.jit(tx.update)
    wanted, _ = update(grads, tx.init(PARAMS), PARAMS)
    grads["encoder"]["kernel"] = jnp.full((3, 3), jnp.nan)
    updates, after = update(grads, tx.init(PARAMS), PARAMS)
    assert fo.health(after).skipped == 0
    jax.tree.map(np.testing.assert_array_equal, updates, wanted)


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        ([], ValueError, "no rules"),
        ([("a",)], TypeError, "rule 0"),
        ([("(", None)], ValueError, "no regular expression"),
        ([("a", optax.identity()), ("a", None)], ValueError, "comes twice"),
        ([("a", "adam")], TypeError, "method"),
        ([("a", optax.identity(), 0)], ValueError, "rate is 0"),
        ([("a", optax.identity(), -1.0)], ValueError, "rate"),
        ([("a", optax.identity(), 1, -1.0)], ValueError, "weight_decay"),
        ([{"pattern": "a", "method": None, "lr": 1}], TypeError, "lr"),
        ([(3, None)], TypeError, "pattern"),
    ],
)
def test_what_is_no_rule_is_refused(rules: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fo.groups(0.1, rules)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([("mlp|norm|encoder", None)], "no rule fits 'embed/embedding'"),
        ([("encodre", None), (".*", None)], "no leaf: nearest are 'encoder/kernel'"),
        ([(".*", None), ("mlp", optax.identity())], "went to rule 0"),
    ],
)
def test_leaves_and_rules_that_miss_each_other_are_told(rules: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fo.groups(0.1, rules).init(PARAMS)
    if "rule fits" not in words:
        fo.groups(0.1, rules, allow_unused=True).init(PARAMS)
