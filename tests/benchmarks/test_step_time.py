"""The timing benchmarks sum up what they say: no clock is read here, or none that a result hangs on."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from benchmarks import results
from benchmarks.catalogue import options_of
from benchmarks.results import ratio
from benchmarks.speed import capture_cost, contenders, step_time, train_step
from benchmarks.speed.contenders import Row
from benchmarks.steps import times_of, update_stepper
from benchmarks.trees import TREES, Tree, make_params, random_like
from experiments import gpt_step, peers
from experiments.models.small import Model

TINY = Tree(layers=1, width=4, vocabulary=5, context=3)
SECONDS = [0.1] * 9 + [1.1] + [0.2] * 10  # two repeats, the first with a refresh


def test_repeats_are_summed_up_each_by_itself() -> None:
    for kind, wanted in (("mean", [200, 200]), ("step", [100, 200]), ("slowest", [1100, 200])):
        np.testing.assert_allclose(times_of(SECONDS)[kind], wanted)


def test_a_ratio_is_that_of_the_medians_and_spreads_over_the_repeats() -> None:
    assert ratio([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == {"median": 4.0, "low": 2.0, "high": 4.0, "n": 3}


def products_with_a_refresh(dtype: Any) -> optax.GradientTransformation:
    """Every step a product of 2,000 flops; every tenth two more, and a QR."""

    def refresh(G: jax.Array) -> jax.Array:
        return jnp.linalg.qr(G @ G @ G)[0]

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        G = updates["kernel"] @ updates["kernel"]
        return {"kernel": jax.lax.cond(state % 10 == 0, refresh, lambda G: G, G)}, state + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def test_a_floor_is_the_flops_of_ten_steps_at_the_rate() -> None:
    """2.4 kF a step on the mean; a rate of 1 GF/s makes them 2.4 µs."""
    shapes = {"kernel": jax.ShapeDtypeStruct((10, 10), jnp.float32)}
    row = step_time.describe("adamw", update_stepper(products_with_a_refresh(jnp.float32), shapes), SECONDS, rate=1.0)
    assert (row["step_gflop"], row["mean_gflop"]) == (2000e-9, 2400e-9)
    assert row["floor_ms"] == pytest.approx(2.4e-3)
    assert row["gemm_share"]["median"] == pytest.approx(2.4e-3 / 200)
    assert (row["step_ms"]["low"], row["step_ms"]["high"]) == (pytest.approx(100), pytest.approx(200))
    assert row["state"] == 1 / 100


def test_promises_are_judged_where_they_are_made() -> None:
    """And elsewhere shown as ratios alone; of who did not run nothing is said."""
    sizes = {"floor_ms": 1500, "step_gflop": 2.0, "mean_gflop": 3.0}
    times = {"fo_muon": [0.8] * 10, "optax_muon": [2.0] * 10, "fo_soap": [1.5] * 10}
    times["fo_soap_staggered"] = [1.0] * 9 + [1.6]
    rows = dict.fromkeys(times, sizes)
    compiles = {"fo_muon": [1.0, 1.0], "optax_muon": [1.5, 2.5], "fo_soap": [2.0, 2.4]}
    small = step_time.promises("small", "cpu", rows, times, compiles)
    ratios = {key: round(row["ratio"]["median"], 3) for key, row in small.items()}
    assert ratios == {
        "muon_step": 0.4,
        "muon_compile": 0.5,
        "soap_step": 1.5,
        "soap_compile": 1.1,
        "staggered_slowest": 1.6,
    }
    judged = {key: row["holds"] for key, row in small.items() if "holds" in row}
    assert judged == {"muon_step": True, "soap_step": False, "staggered_slowest": False}
    deep = step_time.promises("deep", "cpu", rows, times, compiles)
    assert {key: row["holds"] for key, row in deep.items() if "holds" in row} == dict.fromkeys(
        ["muon_compile", "soap_compile"], True
    )
    assert not step_time.promises("deep", "cpu", {"fo_muon": sizes}, times, compiles)


def test_a_stepper_carries_on_and_donates() -> None:
    """Twice is two steps of the optimizer, and what was compiled again is the same program."""
    shapes = {"layer": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}}
    tx, grads = fo.soap(0.1, precondition_frequency=4), random_like(shapes, 0)
    stepper = update_stepper(tx, shapes)
    start, wanted = stepper.carried[1]["layer"]["kernel"], jax.tree.map(jnp.zeros_like, grads)
    state = tx.init(wanted)
    for _ in range(3):
        stepper(grads)
        stepper.compile()
        updates, state = tx.update(grads, state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    assert start.is_deleted()
    np.testing.assert_allclose(stepper.carried[1]["layer"]["kernel"], wanted["layer"]["kernel"], rtol=1e-3, atol=1e-5)
    assert len(stepper.programs) == 4
    assert stepper.refreshes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_time_makes_a_result(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the type asked for, with every contender in one of the tables, and a picture."""
    monkeypatch.setitem(TREES, "small", TINY)
    monkeypatch.setattr(contenders, "COMPILES", 1)
    monkeypatch.setitem(step_time.SIDES, "cpu", 16)
    only = ("adamw", "prism") if dtype == "bfloat16" else ("adamw", "prism", "optax_muon")
    monkeypatch.setattr(peers, "absence", lambda name: "not here")
    (found,) = step_time.measure(
        options_of("step_time", [f"--dtype={dtype}", "--repeats=1", f"--only={','.join(only)}"])
    )
    tables = results.read(results.write(found, tmp_path))["tables"]
    assert {*tables["steps"]["rows"], *tables["absent"]["rows"]} == set(only)
    assert tables["steps"]["rows"]["adamw"]["state"] == pytest.approx(2, rel=0.05)
    assert found["settings"]["parameters"] == 4 * (12 * 4 + 5 + 3 + 2 + 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(make_params(TINY, dtype))} == {jnp.dtype(dtype)}


def test_a_peer_whose_state_changes_type_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second step would be another program than the one that is timed."""
    promoting = optax.GradientTransformation(
        lambda params: 0, lambda updates, state, params=None: (updates, 0.5 + state)
    )
    row = Row("made up", lambda dtype: promoting)
    monkeypatch.setitem(contenders.CONTENDERS, "prism", row)
    monkeypatch.setattr(peers, "absence", lambda name: "")
    shapes = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    found, absent = contenders.build(["prism"], shapes, jnp.dtype("float32"))
    assert not found
    assert absent["prism"].startswith("does not run: TypeError: its state changes type")


def test_a_peer_may_fail_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dtype: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setitem(contenders.CONTENDERS, "prism", Row("made up", fail))
    monkeypatch.setattr(peers, "absence", lambda name: "")
    _, absent = contenders.build(["prism"], {}, jnp.dtype("float32"))
    assert absent == {"prism": "does not run: NotImplementedError: "}


def test_unknown_contenders_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of("step_time", ["--only=adamw,lion"])
    assert "got lion; known are adamw" in capsys.readouterr().err


def test_an_accumulated_gradient_is_that_of_all_tokens() -> None:
    preset = gpt_step.Preset(1, 8, 1, 5, 4, micro_batch=2, micro_batches=3, dtype="float32")
    tokens = jax.random.randint(jax.random.key(0), (3, 2, 5), 0, 5)
    params = jax.jit(preset.model.init)(jax.random.key(1), tokens[0, :, :-1])["params"]
    at_once = preset._replace(micro_batch=6, micro_batches=1)
    found = jax.jit(gpt_step.make_gradient(preset))(params, tokens)
    wanted = jax.jit(gpt_step.make_gradient(at_once))(params, tokens.reshape(1, 6, 5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)
    assert preset.tokens == 24


def test_an_updates_share_is_of_gradient_and_mean_update() -> None:
    times = {"adamw": [0.1] * 20, "fo_muon": [0.1] * 20, "fo_soap": SECONDS}
    rows = train_step.described([1800.0, 1800.0], times)
    assert rows["fo_soap"]["share"]["median"] == pytest.approx(0.1)
    assert rows["fo_soap"]["over_adamw"]["median"] == pytest.approx(2000 / 1900)


def test_captures_promises_are_of_whole_steps_over_sgds() -> None:
    """A refresh is spread over its ten steps; where none is, a slow step among ten is no part of it."""

    cells = {"mean_gflop": 3.0, "memory_mb": 5.0}
    times = {"sgd": SECONDS[:10], "kfac_inverse": [0.3] * 9 + [1.3]}
    rows: dict[str, Any] = {"sgd": {"refresh_ms": None, **cells}, "kfac_inverse": {"refresh_ms": 1300.0, **cells}}
    capture_cost.compare("mlp", rows, times)
    assert (rows["kfac_inverse"]["over_sgd"]["median"], rows["kfac_inverse"]["holds"]) == (pytest.approx(4.0), False)
    assert (rows["kfac_inverse"]["flops_over_sgd"], rows["kfac_inverse"]["memory_over_sgd"]) == (1.0, 1.0)
    assert "holds" not in rows["sgd"]


def test_capture_cost_makes_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A table a model, and a peer that fails named beside them."""

    def failing(*_: Any) -> Any:
        raise ImportError("kfac_jax is gone\nand more")

    monkeypatch.setitem(capture_cost.PEERS, "kfac_jax", failing)
    monkeypatch.setitem(capture_cost.MODELS, "mlp", linear)
    (found,) = capture_cost.measure(
        options_of("capture_cost", ["--model=mlp", "--repeats=1", "--only=kfac_jax,layer_samples,ekfac"])
    )
    tables = results.read(results.write(found, tmp_path))["tables"]
    assert set(tables["mlp"]["rows"]) == {"sgd", "layer_samples", "ekfac"}
    assert tables["absent"]["rows"] == {"mlp kfac_jax": {"reason": "ImportError: kfac_jax is gone"}}
    assert tables["mlp"]["rows"]["ekfac"]["skipped"] == 0
    assert tables["mlp"]["rows"]["sgd"]["over_sgd"]["median"] == 1


def linear() -> Model:
    """The smallest model there is."""
    return Model(
        lambda key: {"layer": {"kernel": jnp.ones((3, 2))}},
        lambda params, x: x @ params["layer"]["kernel"],
        fo.losses.softmax_cross_entropy,
        lambda key: (jnp.ones((4, 3)), jnp.zeros(4, int)),
        2,
    )
