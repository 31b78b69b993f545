"""The scaling benchmark times the steps it says, counts what they compute, and fits the powers it claims."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Jaxpr, Literal

import fisher_optax as fo
from benchmarks import results
from benchmarks.catalogue import options_of
from benchmarks.harness import PERIOD
from benchmarks.speed import devices, scaling
from benchmarks.speed.contenders import CONTENDERS
from benchmarks.steps import mean_flops, ordinary, refreshing, update_stepper
from benchmarks.trees import random_like
from experiments.flops import FACTORISATIONS
from tests.benchmarks.made_up_results import lookup
from tests.comparisons import assert_close

WIDTH = 12


class Executed:
    """Runs a program equation by equation, and counts the products and factorisations on the way that it takes."""

    def __init__(self) -> None:
        self.products, self.factorisations = 0, Counter[str]()

    def run(self, fn: Any, *args: Any) -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        values = self._program(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), values)

    def _program(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            given = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
            values |= zip(eqn.outvars, self._equation(eqn, given), strict=True)
        return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]

    def _equation(self, eqn: Any, given: list[Any]) -> Sequence[Any]:
        name, params = eqn.primitive.name, eqn.params
        inner = params.get("jaxpr") or params.get("call_jaxpr") or params.get("call")
        if name == "cond":
            taken = params["branches"][int(given[0])]
            return self._program(taken.jaxpr, taken.consts, given[1:])
        if name == "while":
            return self._while(params, given)
        assert name != "scan", "one matrix needs no loop"
        if inner is not None and name != "custom_linear_solve":
            return self._program(inner.jaxpr, inner.consts, given)
        if name == "dot_general":
            ((summed, _), _) = params["dimension_numbers"]
            terms = np.prod([given[0].shape[axis] for axis in summed], dtype=int)
            self.products += 2 * int(terms) * eqn.outvars[0].aval.size
        if name in FACTORISATIONS:
            self.factorisations[f"{name} {', '.join(str(x.shape) for x in given)}"] += 1
        out = eqn.primitive.bind(*given, **params)
        return out if eqn.primitive.multiple_results else [out]

    def _while(self, params: Any, given: list[Any]) -> list[Any]:
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        of_test, of_body = given[: params["cond_nconsts"]], given[params["cond_nconsts"] :][: params["body_nconsts"]]
        carry = given[params["cond_nconsts"] + params["body_nconsts"] :]
        while self._program(test.jaxpr, test.consts, [*of_test, *carry])[0]:
            carry = self._program(body.jaxpr, body.consts, [*of_body, *carry])
        return carry


def one_kernel(width: int) -> Any:
    return {"layer": {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float32)}}


@pytest.mark.parametrize("name", ["fo_soap", "fo_dykaf"])
def test_ten_real_steps_are_nine_ordinary_ones_and_a_refresh(name: str) -> None:
    """What calls 11 to 20 of the optimizer execute, counted as they run, is ten times what the table amortises."""
    tree, tx = one_kernel(WIDTH), CONTENDERS[name].build(jnp.float32)
    stepper, params = update_stepper(tx, tree), random_like(tree, 0)
    state = tx.init(params)
    step, executed = jax.jit(tx.update), Executed()
    for i in range(PERIOD):
        _, state = step(random_like(tree, i), state, params)
    for i in range(PERIOD):
        _, state = executed.run(tx.update, random_like(tree, PERIOD + i), state, params)
    assert executed.products == pytest.approx(PERIOD * mean_flops(stepper.flops))
    assert executed.factorisations == refreshing(stepper.flops).factorisations
    assert executed.factorisations == {
        f"geqrf {(WIDTH, WIDTH)}": 2,
        f"householder_product {(WIDTH, WIDTH)}, {(WIDTH,)}": 2,
    }
    assert not ordinary(stepper.flops).factorisations
    assert stepper.refreshes


def test_a_method_without_refreshes_has_one_kind_of_step() -> None:
    stepper = update_stepper(CONTENDERS["fo_muon"].build(jnp.float32), one_kernel(WIDTH))
    assert not stepper.refreshes
    assert mean_flops(stepper.flops) == 5 * 6 * WIDTH**3  # two products with X and one of squares a step
    assert "refresh_ms" not in scaling.row(stepper, [0.1] * PERIOD)


def test_apart_is_the_same_optimizer_on_stacks_of_one() -> None:
    params = random_like({"a": one_kernel(4), "b": one_kernel(4), "scale": jax.ShapeDtypeStruct((4,), "float32")}, 0)
    updates, programs = [], []
    for tx in (fo.muon(1e-2), scaling.apart(lambda: fo.muon(1e-2))):
        update, given = jax.jit(tx.update), (params, tx.init(params), params)
        updates.append(update(*given)[0])
        programs.append(update.lower(*given).as_text().count("dot_general"))
    assert_close(updates[0], updates[1], 1e-5)
    assert programs[1] == 2 * programs[0] > 0


COLLECTIVES = """
  %a = f32[4,8]{1,0} all-gather(%x), dimensions={0}
  %b = (f32[1,8]{1,0}, bf16[2]{0}) all-to-all(%x, %y)
  ROOT %c = (f32[1,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%z)
  %d = f32[4,8]{1,0} all-gather-done(%c)
  %e = pred[] all-reduce(%w), metadata={op_name="all-gather(no)"}
"""


def test_collectives_are_counted_by_what_a_device_receives() -> None:
    """The operands in the result of a start are none, and its end is not another."""
    assert devices.collectives(COLLECTIVES) == (4, 128 + (32 + 4) + 128 + 1)


def test_a_device_has_its_share_of_the_products_and_of_the_state() -> None:
    """Three matrices on two devices: two on each, a third more than half; on their own, all on every device."""
    tree = {f"layer_{i}": one_kernel(8)["layer"] for i in range(3)}

    def size(axis: str | None, count: int) -> dict[str, Any]:
        tx = fo.scale_by_soap(fallback=optax.identity(), storage=fo.Storage(mesh_axis=axis))
        stepper = devices.place(tx, tree, count)
        text = stepper.programs[0].run.as_text() or ""
        assert not [line for line in text.splitlines() if "while/body" in line and " all-" in line]
        assert np.all(jnp.isfinite(jax.tree.leaves(stepper(stepper.given))[-1]))
        return devices.size(stepper, count if axis else 1)

    alone, shared = size(None, 1), size("data", 2)
    assert shared["gflop"] == pytest.approx(2 / 3 * alone["gflop"])
    assert shared["state_mb"] == pytest.approx(2 / 3 * alone["state_mb"], rel=0.02)  # and counters
    assert alone["collectives"] == 0
    assert shared["collective_mb"] == pytest.approx(4 * 8 * 8 * 4 / 1e6, rel=0.02)  # directions, one of them filler


def test_a_run_gives_results_that_draw(tmp_path: Any) -> None:
    sizes = "--widths 4,8 --layers 1 --layer-width 4 --devices= --methods adamw,fo_muon --patience 0.1"
    given = [*scaling.measure(options_of("scaling", sizes.split()))]
    assert [[len(found["tables"][part]["rows"]) for part in ("width", "layers")] for found in given] == [
        [2, 0],
        [4, 0],
        [4, 3],
    ]
    found = results.read(results.write(given[-1], tmp_path))
    assert lookup(found, "width/fo_muon_8/gflop") == pytest.approx(5 * 6 * 8**3 / 1e9)
    assert lookup(found, "width/adamw_8/over_adamw") == 1
    shares = {"gflop_share": 0.5, "state_share": 0.5}
    found["tables"]["devices"]["rows"] = {"fo_soap_2": shares, "fo_muon_2": shares}
    figure = scaling.draw(found)
    figure.savefig(tmp_path / "scaling.png")
    assert all(axes.get_lines() for axes in figure.axes)
