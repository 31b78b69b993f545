"""Layers stored in other orders than the rules read: their statistics say whose they are, and no step mixes them up."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax.matrices.axes import path_names

pytestmark = pytest.mark.usefixtures("x64")
METHODS: dict[str, tuple[Any, Any]] = {
    "kfac": (fo.scale_by_kfac, fo.KroneckerFactors()),
    "ekfac": (fo.scale_by_ekfac, fo.KroneckerFactors(squares=True)),
    "kfac_soap": (fo.scale_by_kfac_soap, fo.KroneckerFactors()),
    "frog": (fo.scale_by_frog, fo.LayerSamples()),
    "kfrog": (fo.scale_by_kfrog, fo.LayerSamples()),
}
each_method = pytest.mark.parametrize("method", METHODS)
N, D = 12, 4

# Where an axis of the layer, inputs first, comes from when it is stored otherwise. All lengths that meet agree.
STORED = {
    "plain/kernel": (1, 0),
    "biased/kernel": (1, 0),
    "pair/0": (1, 0),
    "conv/kernel": (0, 1, 3, 2),
    "out/kernel": (1, 2, 0),
    "layers/mix/kernel": (1, 0, 2),
    "layers/norm/scale": (1, 0),
}
# How the rules read what is stored so, or a user where they leave it open, and what the program does with it.
READ = {
    "plain/kernel": (fo.MatrixAxes(0, 1), fo.MatrixAxes(1, 0)),
    "biased/kernel": (fo.MatrixAxes(0, 1), fo.MatrixAxes(1, 0)),
    "pair/0": (fo.MatrixAxes(0, 1), fo.MatrixAxes(1, 0)),
    "conv/kernel": (fo.MatrixAxes((0, 1, 2), 3), fo.MatrixAxes((0, 1, 3), 2)),
    "out/kernel": (fo.MatrixAxes((0, 1), 2), fo.MatrixAxes(2, (0, 1))),
    "layers/mix/kernel": (fo.MatrixAxes(1, 2, 0), fo.MatrixAxes(0, 2, 1)),
}
each_layer = pytest.mark.parametrize("path", READ)


def params() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    return {
        "plain": {"kernel": draw(D, D)},
        "biased": {"kernel": draw(D, D), "bias": draw(D)},
        "pair": (draw(D, D), draw(D)),
        "conv": {"kernel": draw(2, 2, 3, 3), "bias": draw(3)},
        "out": {"kernel": draw(D, 2, 2)},
        "layers": {"mix": {"kernel": draw(D, D, D) / 2}, "norm": {"scale": draw(D, D)}},
    }


def data() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(N, D)) * np.linspace(0.2, 3, D)), jnp.asarray(rng.normal(size=(N, 3, 3, 3)))


def outputs(p: Any, x: Any, images: Any) -> jax.Array:
    """Of the layers that ``p`` has, stored inputs first."""

    def in_stack(h: Any, layer: Any) -> Any:
        return h + jnp.tanh(layer["norm"]["scale"] * h @ layer["mix"]["kernel"]), None

    known = {
        "plain": lambda p: x @ p["kernel"],
        "biased": lambda p: x @ p["kernel"] + p["bias"],
        "pair": lambda p: x @ p[0] + p[1],
        "conv": lambda p: convolution(images, p["kernel"]) + p["bias"],
        "out": lambda p: jnp.einsum("bi,ihf->bhf", x, p["kernel"]),
        "layers": lambda p: jax.lax.scan(in_stack, x, p)[0],
    }
    return jnp.concatenate([f(p[name]).reshape(N, -1) for name, f in known.items() if name in p], -1)


def convolution(x: Any, kernel: Any) -> Any:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def loss(p: Any, *data: Any) -> Any:
    z = outputs(p, *data)
    return fo.losses.gaussian(z, jnp.sin(jnp.arange(z.size).reshape(z.shape)))


def stored(tree: Any, back: bool = False) -> Any:
    """The layers in the order they are stored in here, or as they were."""

    def one(path: Any, x: Any) -> Any:
        order = STORED.get("/".join(path_names(path)), tuple(range(jnp.ndim(x))))
        return jnp.transpose(x, np.argsort(order) if back else order)

    return jax.tree.map_with_path(one, tree)


def stored_loss(q: Any, *data: Any) -> Any:
    return loss(stored(q, back=True), *data)


def two_steps(method: str, loss: Any, p: Any, axes: Any) -> Any:
    make, kind = METHODS[method]
    tx, grad_fn = make(axes=axes, fallback=optax.identity()), fo.value_and_grad(loss, kind)

    def step(state: Any) -> Any:
        bases = {"bases": fo.eigenbases(state, p, axes)} if method == "ekfac" else {}
        _, grads, stats = grad_fn(p, *data(), **bases)
        return tx.update(grads, state, p, statistics=stats)

    return jax.jit(lambda: step(step(tx.init(p))[1])[0])()


@each_method
def test_inferred_axes_make_the_step_of_the_layers_own_order(method: str) -> None:
    p = params()
    wanted = two_steps(method, loss, p, fo.infer_axes(loss, p, *data()))
    q = stored(p)
    kind = METHODS[method][1]
    actual = stored(
        two_steps(method, stored_loss, q, fo.infer_axes(stored_loss, q, *data(), statistics=kind)), back=True
    )
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8 * float(jnp.abs(y).max()))


@each_layer
@each_method
def test_statistics_of_other_axes_are_refused_and_both_are_named(method: str, path: str) -> None:
    """Before anything is computed, so under jit too; all shapes agree."""
    name = path.split("/")[0]
    make, kind = METHODS[method]
    q = stored({name: params()[name]})
    axes = {"layers": {"mix": {"kernel": READ[path][0]}, "norm": {"scale": None}}} if name == "layers" else None
    tx = make(axes=axes)

    def step() -> Any:
        state = tx.init(q)
        bases = {"bases": fo.eigenbases(state, q, axes)} if method == "ekfac" else {}
        _, grads, stats = fo.value_and_grad(stored_loss, kind)(q, *data(), **bases)
        return tx.update(grads, state, q, statistics=stats)

    mine, theirs = READ[path]
    both = rf"fo\.{method} reads {path!r} of .* as {re.escape(str(mine))}, but .* of {re.escape(str(theirs))}, as the"
    if (method, name) == ("ekfac", "pair"):  # capture adds the bias, and so sees it before
        both = (
            rf"bases of {path!r}: left has shape \(4, 4\); wanted \(5, 5\).*{re.escape(str(theirs))} with bias 'pair/1'"
        )
    with pytest.raises(ValueError, match=both + r".*axes=fo\.infer_axes\(loss_fn, params, batch"):
        jax.eval_shape(step)


def test_kfacs_step_by_hand_where_outputs_are_stored_first() -> None:
    """``(A ⊗ B + λ)⁻¹ G`` of the weight and its bias in NumPy, in the layer's own sense."""
    q, damping = stored({"biased": params()["biased"]}), 1e-2
    value, grads, stats = jax.jit(fo.value_and_grad(stored_loss))(q, *data())
    tx = fo.scale_by_kfac(damping=damping, axes=fo.infer_axes(stored_loss, q, *data()))
    U = jax.jit(tx.update)(grads, tx.init(q), q, statistics=stats)[0]["biased"]
    a = np.concatenate([data()[0], np.ones((N, 1))], 1)
    residual = a @ np.concatenate([q["biased"]["kernel"].T, q["biased"]["bias"][None]])
    residual -= np.sin(np.arange(N * D)).reshape(N, D)
    np.testing.assert_allclose(value, np.sum(residual**2) / 2 / N, rtol=1e-12)
    F = np.kron(a.T @ a / N, residual.T @ residual / N)
    wanted = np.linalg.solve(F + damping * np.eye(len(F)), (a.T @ residual / N).ravel()).reshape(D + 1, D)
    np.testing.assert_allclose(U["kernel"].T, wanted[:-1], rtol=1e-8)
    np.testing.assert_allclose(U["bias"], wanted[-1], rtol=1e-8)


@pytest.mark.parametrize("kind", [fo.KroneckerFactors(), fo.LayerSamples(4)], ids=lambda kind: type(kind).__name__)
def test_axes_travel_with_statistics(kind: Any) -> None:
    q = stored({"biased": params()["biased"]})
    axes = fo.infer_axes(stored_loss, q, *data())["biased"]["kernel"]
    assert axes == fo.MatrixAxes(1, 0, bias="biased/bias")
    grad_fn = jax.jit(lambda q: fo.value_and_grad(stored_loss, kind)(q, *data())[2])
    stats = grad_fn(q)
    summed = jax.lax.scan(lambda s, _: (jax.tree.map(jnp.add, s, grad_fn(q)), None), stats, length=2)[0]
    both = fo.accumulate_statistics(stats, summed)
    restored = jax.tree.unflatten(jax.tree.structure(stats), jax.tree.leaves(stats))
    trees = (stats, summed, both, restored, jax.eval_shape(grad_fn, q))
    assert [tree["biased"]["kernel"].axes for tree in trees] == [axes] * len(trees)
    assert len({jax.tree.structure(tree) for tree in trees}) == 1


def test_micro_batches_of_other_axes_are_no_sum() -> None:
    q = {"plain": params()["plain"]}
    mine, theirs = (fo.value_and_grad(f)(q, *data())[2] for f in (loss, stored_loss))
    with pytest.raises(ValueError, match=r"'plain/kernel' differ: .*inputs=\(0,\).*inputs=\(1,\).*the same fo.value"):
        fo.accumulate_statistics(mine, theirs)


def test_what_makes_no_difference_is_taken() -> None:
    """Axes of length 1, axes counted from the end, and none at all, of statistics made by hand."""
    q = {"kernel": jnp.ones((1, D)), "bias": jnp.zeros(1)}
    row_loss = lambda q, x: fo.losses.gaussian(x @ q["kernel"].T + q["bias"], jnp.ones((N, 1)))  # noqa: E731
    axes = fo.infer_axes(row_loss, q, data()[0])
    assert axes["kernel"] == fo.MatrixAxes(1, 0, bias="bias")
    _, grads, stats = fo.value_and_grad(row_loss)(q, data()[0])

    def step(given: Any, axes: Any) -> Any:
        tx = fo.scale_by_kfac(axes=axes)
        return jax.jit(tx.update)(grads, tx.init(q), q, statistics=stats | {"kernel": given})[0]["kernel"]

    wanted = step(stats["kernel"], axes)
    for given in (None, fo.MatrixAxes(-1, -2), fo.MatrixAxes(-1, -2, bias="bias")):
        other = dataclasses.replace(stats["kernel"], axes=given)
        np.testing.assert_array_equal(step(other, axes), wanted)
    stack = {"kernel": fo.MatrixAxes(1, 0).resolve("", (1, D)), "bias": None}
    np.testing.assert_array_equal(step(stats["kernel"], stack), wanted)
    with pytest.raises(ValueError, match=r"axes of 'kernel in its statistics'.* does not fit shape \(1, 4\)"):
        step(dataclasses.replace(stats["kernel"], axes=fo.MatrixAxes(1, 2, 0)), axes)


def test_another_bias_is_refused() -> None:
    """One beside the kernel that the program adds elsewhere, where the kernel has one of its own."""
    q = {"kernel": jnp.ones((D, D)), "bias": jnp.zeros(D), "shift": jnp.zeros(D)}
    grad_fn = fo.value_and_grad(
        lambda q, x: fo.losses.gaussian(jnp.tanh(x @ q["kernel"] + q["shift"]) + q["bias"], jnp.ones((N, D)))
    )
    tx = fo.kfac(0.1)
    with pytest.raises(ValueError, match=r"with bias 'bias', but its statistics are of .* with bias 'shift'"):
        jax.eval_shape(lambda: tx.update(q, tx.init(q), q, statistics=grad_fn(q, data()[0])[2]))
