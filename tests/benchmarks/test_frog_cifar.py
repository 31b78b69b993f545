"""What the benchmark of FROG on CIFAR-10 says is what its runs and its clock say; what FROG's step costs."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import fisher_optax as fo
from benchmarks import results
from benchmarks.catalogue import options_of
from benchmarks.training import frog_cifar
from experiments import train_images
from experiments.compare_report import entries
from experiments.comparison import Runs, Task
from experiments.flops import count_matmul_flops
from experiments.frog_cifar import PLAIN, Setting
from experiments.images import Images
from experiments.models.resnet import ResNet
from tests.benchmarks.made_up_results import lookup
from tests.experiments.test_image_parts import random_part
from tests.optimizers.frog_layers import LAYERS, given, sampled

DATA = Images("CIFAR-10", random_part(40, 8, 8, 3), random_part(20, 8, 8, 3))


def made_up(path: Path, errors: dict[tuple[str, int], list[float]]) -> Runs:
    """Runs that were never trained: the errors of each method and seed, an evaluation an epoch."""

    def train(setting: Setting, data: Images) -> list[dict[str, Any]]:
        found = enumerate(errors[setting.optimizer, setting.seed])
        return [{"step": i, "epoch": i, "test_loss": e, "test_accuracy": 1 - e, "test_error": e} for i, e in found]

    names = list(dict.fromkeys(name for name, _ in errors))
    setting = Setting(data="CIFAR-10", model="resnet18", batch=20, sgd_batch=5)
    runs = Runs(path, Task(setting, DATA, train, "test_error", dict.fromkeys(names, (0.1,))))
    runs.make(range(2))
    return runs


def test_epochs_and_minutes_follow_from_the_runs_and_the_steps(tmp_path: Path) -> None:
    """SGD takes 8 steps an epoch, FROG 2; lines join the evaluations; what one seed misses is empty."""
    sgd = {("sgd", 0): [0.9, 0.7, 0.5, 0.3], ("sgd", 1): [0.9, 0.8, 0.7, 0.6]}
    errors = {**sgd, ("frog", 0): [0.9, 0.3], ("frog", 1): [0.9, 0.5]}
    times = {"sgd": [1e3, 3e3, 2e3], "frog": [6e3, 6e3, 6e3], PLAIN: [3e3]}
    runs = made_up(tmp_path / "runs.json", errors)
    tables = frog_cifar.to_targets(runs, ["sgd", "frog"], times, [30, 50])
    cell = functools.partial(lookup, {"name": "made up", "tables": tables})
    assert cell("epochs/sgd/30/low") == pytest.approx(1)
    assert cell("epochs/sgd/30/high") == pytest.approx(2)
    assert cell("epochs/frog/50") == pytest.approx((0.4 / 0.6 + 1) / 2)
    assert cell("epochs/sgd/50") is None
    assert cell("minutes/sgd/30/high") == pytest.approx(2 * 16 / 60)
    assert cell("minutes/frog/50/high") == pytest.approx(12 / 60)
    entry = entries(runs, ["frog"])["frog"]
    assert frog_cifar.cells(runs, "frog", entry, times) == {"batch": 20, "over_plain": 2}
    assert frog_cifar.cells(runs, "sgd", entry, times) == {"batch": 5, "over_plain": None}
    assert list(frog_cifar.to_targets(runs, ["frog"], {}, [30])) == ["epochs"]


def test_a_whole_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains what it says, SGD with its own batch, and a result without times comes first."""
    monkeypatch.setattr(frog_cifar, "load_images", lambda source: DATA)
    monkeypatch.setattr(train_images, "ResNet", functools.partial(ResNet, blocks=(1,)))
    monkeypatch.setattr(frog_cifar, "RATES", {"sgd": (0.1, 1e30), PLAIN: (0.1,), "frog": (1e-2,)})
    given = ["--width=2", "--batch=20", "--sgd-batch=10", "--samples=3", "--epochs=1", "--seeds=2", "--rounds=1"]
    files = [f"--runs={tmp_path / 'runs.json'}", f"--data={tmp_path}", f"--out={tmp_path}"]
    options = options_of("frog_cifar", [*given, *files, "--methods=sgd,sgd_large,frog", "--targets=5,99"])
    monkeypatch.setattr(train_images, "advance", traced := Traced(train_images.advance))
    before, after = frog_cifar.measure(options)
    results.check(after, "the result")
    assert "minutes" not in before["tables"]
    assert str(tmp_path) not in str(after)
    assert after["tables"]["grid"]["rows"]["sgd"]["1e+30"] == "diverged"
    assert lookup(after, "methods/sgd/rate") == 0.1
    assert [lookup(after, f"methods/{name}/batch") for name in ("sgd", PLAIN, "frog")] == [10, 20, 20]
    assert {(program.config.optimizer, program.config.batch) for program in traced.programs} == {
        ("sgd", 10), ("sgd", 20), ("frog", 20)
    }  # fmt: skip
    assert {program.config.samples for program in traced.programs} == {3}
    assert {program.model.width for program in traced.programs} == {2}
    figure = frog_cifar.draw(results.read(results.write(after, tmp_path)))
    assert len(figure.axes) == 2


class Traced:
    """A step that remembers what it was called for."""

    def __init__(self, advance: Any):
        self.advance, self.programs = advance, []

    def __call__(self, program: Any, *args: Any) -> Any:
        self.programs.append(program)
        return self.advance(program, *args)


# --- what FROG's step costs


def frogs_update(iterations: int) -> tuple[Any, Any]:
    grads, samples = sampled(LAYERS["conv"], dtype=jnp.float32)
    tx = fo.frog(0.1, iterations=iterations)
    state = tx.init(grads)
    return lambda grads: tx.update(grads, state, grads, statistics=given(samples)), grads


def test_a_step_of_conjugate_gradients_takes_two_products_and_the_last_one_less() -> None:
    r, places, D, n = 4, 5 * 4, 3 * 3 * 2, 3
    product = 2 * r * places * D * n
    sizes = product // n  # |X_i|²
    for iterations in (1, 4):
        assert count_matmul_flops(*frogs_update(iterations)).most == (2 * iterations - 1) * product + sizes


def test_no_convolution_of_frogs_is_inside_a_conditional_or_a_loop() -> None:
    """There XLA's convolutions for a CPU are many times slower."""
    update, grads = frogs_update(4)
    program = jax.make_jaxpr(update)(grads).jaxpr
    outside, everywhere = (convolutions(program, closed) for closed in (True, False))
    assert outside == everywhere > 0


def convolutions(jaxpr: Any, closed: bool) -> int:
    """In whatever depth; if ``closed``, without those in conditionals and in loops that stay loops."""
    count = 0
    for eqn in jaxpr.eqns:
        loop = eqn.primitive.name == "scan" and eqn.params["unroll"] < eqn.params["length"]
        if not (closed and (loop or eqn.primitive.name in ("cond", "while"))):
            inner = [getattr(p, "jaxpr", p) for p in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns"))]
            count += sum(convolutions(part, closed) for part in inner if hasattr(part, "eqns"))
        count += eqn.primitive.name == "conv_general_dilated"
    return count
