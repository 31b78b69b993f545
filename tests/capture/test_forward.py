"""Inputs are summed up on the way forward: what a program does with a layer's outputs changes nothing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import fisher_optax as fo
from fisher_optax.compression.model.calibration import input_gram
from fisher_optax.compression.model.layers import find_layers
from tests.capture.capture_models import assert_near

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
SHAPES = {"in": (3, 5), "mid": (5, 5), "out": (5, 2), "stack": (3, 5, 5)}
PARAMS = {name: RNG.normal(size=shape) / 2 for name, shape in SHAPES.items()}
X = RNG.normal(size=(7, 3))
Show = Callable[[str, Any], Any]


def hidden(p: Any, x: Any, show: Show) -> Any:
    return show("in", x) @ p["in"]


def unless_shown(transform: Any, show: Show) -> Any:
    """What traces although nothing is compiled."""
    return transform if show is unshown else lambda f: f


def unshown(name: str, a: Any) -> Any:
    del name
    return a


@jax.custom_vjp
def two_products(x: Any, W: Any, V: Any) -> Any:
    return jnp.tanh(x @ W) @ V


two_products.defvjp(lambda *operands: (two_products(*operands), operands), lambda operands, _: operands)


def branches(taken: bool) -> Any:
    def program(p: Any, x: Any, show: Show) -> Any:
        h = hidden(p, x, show)
        yes = lambda h: jnp.tanh(show("mid", h) @ p["mid"])  # noqa: E731
        return show("out", jax.lax.cond((x.sum() < 1e9) == taken, yes, jnp.tanh, h)) @ p["out"]

    return program


def a_while_loop(p: Any, x: Any, show: Show) -> Any:
    """Its condition asks a layer too: once more than there are steps."""

    def goes_on(carry: Any) -> Any:
        return (carry[0] < 3) & (jnp.sum(show("out", carry[1]) @ p["out"]) < jnp.inf)

    def step(carry: Any) -> Any:
        i, h = carry
        for k in (0, 2):
            h = jnp.tanh(show(f"stack[{k}]", h) @ p["stack"][k])
        return i + 1, jnp.tanh(show("mid", h) @ p["mid"])

    return jax.lax.while_loop(goes_on, step, (0, jnp.tanh(hidden(p, x, show))))[1]


def a_loop_over_a_stack(p: Any, x: Any, show: Show) -> Any:
    """With one product of the stack, by index, inside of another loop, and a layer of all steps."""

    def step(h: Any, operands: Any) -> Any:
        i, W = operands
        h = jnp.tanh(show("mid", h) @ p["mid"])
        return jnp.tanh(show(f"stack[{i}]", h) @ W), jnp.round(h)

    return jax.lax.scan(step, hidden(p, x, show), (jnp.arange(3), p["stack"]), reverse=True)


def in_part_of_a_stack(p: Any, x: Any, show: Show) -> Any:
    """Each step takes its branch; the last matrix meets no input."""

    def step(h: Any, operands: Any) -> Any:
        i, W = operands
        return jax.lax.cond(i < 2, lambda h: jnp.sign(show(f"stack[{i}]", h) @ W), lambda h: h, h), ()

    h = jax.lax.scan(step, jnp.round(hidden(p, x, show)), (jnp.arange(3), p["stack"]))[0]
    return jnp.sign(show("stack[0]", h) @ p["stack"][0])


PROGRAMS: dict[str, Any] = {
    "stopped": lambda p, x, show: show("out", jax.lax.stop_gradient(hidden(p, x, show))) @ p["out"],
    "rounded": lambda p, x, show: show("out", jnp.round(3 * hidden(p, x, show))) @ p["out"],
    "signs": lambda p, x, show: show("out", jnp.sign(hidden(p, x, show))) @ p["out"],
    "routed": lambda p, x, show: show("out", jax.nn.one_hot(jnp.argmax(hidden(p, x, show), -1), 5)) @ p["out"],
    "integers alone": lambda p, x, show: jnp.argmax(show("out", hidden(p, x, show)) @ p["out"], -1),
    "nothing returned": lambda p, x, show: (hidden(p, x, show), ())[1],
    "twice, once detached": lambda p, x, show: jax.lax.stop_gradient(hidden(p, x, show)) - hidden(p, 3 * x, show),
    "a derivative of its own": lambda p, x, show: two_products(show("mid", x @ jnp.ones((3, 5))), p["mid"], p["out"]),
    "rematerialised": lambda p, x, show: unless_shown(jax.checkpoint, show)(lambda x: jnp.sign(hidden(p, x, show)))(x),
    "branch taken": branches(True),
    "branch not taken": branches(False),
    "while": a_while_loop,
    "stack": a_loop_over_a_stack,
    "part of a stack": in_part_of_a_stack,
}


def shown(program: Any, x: Any) -> dict[str, np.ndarray]:
    """The inputs of each layer, from the program run step by step, with Python's own loops and branches."""
    found: dict[str, list[np.ndarray]] = {}

    def show(name: str, a: Any) -> Any:
        found.setdefault(name, []).append(np.asarray(a))
        return a

    with jax.disable_jit():
        program(PARAMS, x, show)
    return {name: np.concatenate(rows) for name, rows in found.items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_second_moments_are_those_of_all_inputs(name: str) -> None:
    """Of two batches, of which not all matrices of a stack need get as many inputs."""
    apply_fn = lambda p, x: PROGRAMS[name](p, x, unshown)  # noqa: E731
    batches = [X, 2 * X[:4]]
    inputs = [shown(PROGRAMS[name], x) for x in batches]
    wanted = {key: np.concatenate([rows[key] for rows in inputs]) for key in inputs[0]}
    if name == "a derivative of its own":
        wanted["out"] = np.tanh(wanted["mid"] @ np.asarray(PARAMS["mid"]))
    layers = find_layers(apply_fn, PARAMS, X, lambda path: True)
    for layer in layers:
        for member, H in zip(layer.members, input_gram(apply_fn, PARAMS, batches, layer), strict=True):
            rows = wanted.pop(f"stack[{member}]" if layer.path == "stack" else layer.path, None)
            if rows is None:
                assert not H.any()
            else:
                assert_near(H, rows.T @ rows / len(rows))
    assert not wanted
    assert layers


def test_a_while_loop_under_vmap_counts_each_example_while_it_runs() -> None:
    """As the loop of one example after another does; inputs of those that have finished would be others."""

    def one(p: Any, x: Any) -> Any:
        goes_on = lambda h: jnp.sum((h @ p["mid"]) ** 2) > 0.3  # noqa: E731
        h = jax.lax.while_loop(goes_on, lambda h: jnp.tanh(0.8 * h @ p["stack"][1]), x @ p["in"])
        return h @ p["out"]

    together = lambda p, x: jax.vmap(lambda x: one(p, x))(x)  # noqa: E731
    wanted = find_layers(one, PARAMS, X[0], lambda path: True)
    layers = find_layers(together, PARAMS, X, lambda path: True)
    assert [layer.name for layer in layers] == [layer.name for layer in wanted]
    for layer in layers:
        assert_near(input_gram(together, PARAMS, [X], layer), input_gram(one, PARAMS, list(X), layer))


@pytest.mark.parametrize("name", ["stopped", "rounded", "twice, once detached", "stack", "branch taken"])
def test_gradients_and_inputs_come_from_one_call(name: str) -> None:
    """``fo.InputGram`` beside gradients, which are those of the loss as it is."""
    loss = lambda p: sum(jnp.sum(y**2) for y in jax.tree.leaves(PROGRAMS[name](p, X, unshown)))  # noqa: E731
    value, grads, stats = jax.jit(fo.value_and_grad(loss, fo.InputGram()))(PARAMS)
    wanted = jax.value_and_grad(loss)(PARAMS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), (value, grads), wanted)
    rows = shown(PROGRAMS[name], X)
    for path, found in stats.items():
        if path in rows:
            assert_near(found.left, rows[path].T @ rows[path] / len(rows[path]))
            assert found.weight == len(rows[path])
        for i in range(3 if f"{path}[0]" in rows else 0):
            assert_near(found.left[i], rows[f"{path}[{i}]"].T @ rows[f"{path}[{i}]"] / len(X))


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_add_up_their_inputs(check_vma: bool, types: AxisType) -> None:
    """In a shard_map in the model, inside of a loop there, and on a mesh that the compiler splits."""
    mesh = jax.make_mesh((2,), ("d",), (types,), devices=jax.devices()[:2])
    x, mask = RNG.normal(size=(8, 3)), jnp.arange(8) < 5

    def model(p: Any, x: Any) -> Any:
        step = lambda h, W: (jnp.sign(h @ p["mid"] @ W), ())  # noqa: E731
        local = lambda x, p: jax.lax.scan(step, jnp.round(x @ p["in"]), p["stack"])[0] @ p["out"]  # noqa: E731
        mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"), check_vma=check_vma)
        return mapped(x, p)

    def plain(p: Any, x: Any) -> Any:
        h = jnp.round(x @ p["in"])
        for W in p["stack"]:
            h = jnp.sign(h @ p["mid"] @ W)
        return h @ p["out"]

    everything = lambda path: True  # noqa: E731
    with jax.set_mesh(mesh):
        split = jax.device_put(x, jax.NamedSharding(mesh, P("d")))
        found = {
            layer.name: input_gram(model, PARAMS, [split], layer, mask=lambda x: mask)
            for layer in find_layers(model, PARAMS, split, everything)
        }
    wanted = {
        layer.name: input_gram(plain, PARAMS, [x[:5]], layer) for layer in find_layers(plain, PARAMS, x, everything)
    }
    assert found.keys() == wanted.keys()
    for name, H in wanted.items():
        assert_near(found[name], H)


@pytest.mark.parametrize("name", ["while", "integers alone", "stack"])
def test_report_of_inputs_asks_for_no_gradient(name: str) -> None:
    """Of a model as it is: of its layers, those that a batch reaches."""
    report = fo.report(lambda p, x: PROGRAMS[name](p, x, unshown), PARAMS, X, statistics=fo.InputGram())
    rows = {row.path: row for row in report.rows}
    assert rows["in"].statistics == ((3, 3),)
    assert rows["mid"].statistics == (() if name == "integers alone" else ((5, 5),))
    assert rows["stack"].statistics == (() if name == "integers alone" else ((3, 5, 5),))


def test_integer_parameters_pass_through() -> None:
    """No gradient is asked for, so a tree may hold what has none."""
    params = {"w": jnp.asarray(RNG.normal(size=(3, 4))), "steps": jnp.arange(3), "key": jax.random.key(0)}
    apply_fn = lambda p, x: jnp.argmax(x @ p["w"] + p["steps"][1], -1)  # noqa: E731
    pruned, masks, _ = fo.compression.prune(apply_fn, params, [X], "sparsegpt", 0.5, progress=False)
    assert (pruned["steps"] == params["steps"]).all()
    assert masks["steps"] is masks["key"] is None
    assert pruned["key"] == params["key"]
    assert int(masks["w"].sum()) == 4


def test_inputs_of_numpy_reach_a_kind_as_arrays() -> None:
    """As a loss closes over its data."""
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    loss = lambda p: fo.losses.gaussian(x @ p["kernel"], jnp.zeros((4, 3)))  # noqa: E731
    statistics = fo.value_and_grad(loss, statistics=fo.InputGram())({"kernel": jnp.ones((2, 3))})[2]
    np.testing.assert_allclose(statistics["kernel"].left, x.T @ x / 4, rtol=1e-6)
