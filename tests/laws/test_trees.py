"""What a tree of parameters may be made of: nodes that could be called, leaves that are no arrays of real numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import fisher_optax as fo
from tests.callable_trees import Module, NnxModule, module_of
from tests.optimizers_table import METHODS, Row, build, each, standard_params, updater


def program(row: Row, params: Any, **options: Any) -> str:
    """What `init` and `update` compute, by leaves alone."""
    tx = build(row, **options)
    state = jax.eval_shape(tx.init, params)
    step = updater(tx, **row.update_kwargs)
    return f"{jax.make_jaxpr(tx.init)(params)}\n{jax.make_jaxpr(step)(params, state, params)}"


@each(METHODS)
def test_a_tree_that_could_be_called_is_the_dictionary_of_its_names(row: Row) -> None:
    """As parameters, and as a mask and as axes where a method takes them: the same program for the same leaves."""
    params = standard_params()
    options: dict[str, Any] = {}
    if row.takes_axes:
        options["axes"] = jax.tree.map(lambda x: fo.MatrixAxes() if x.ndim == 2 else None, params)
    if row.takes_axes and row.undecayed:
        options["mask"] = jax.tree.map(lambda x: x.ndim > 1, params)
    wanted = program(row, params, **options)
    for node in (Module, NnxModule):
        given = {name: module_of(tree, node) for name, tree in options.items()}
        assert program(row, module_of(params, node), **given) == wanted


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32], ids=["complex", "integer"])
@each(row for row in METHODS if row.takes_axes)
def test_a_matrix_that_a_method_cannot_take_is_refused_where_axes_name_it(row: Row, dtype: Any) -> None:
    """And is left to the fallback where they do not: Muon alone takes complex ones."""
    params = {"kernel": jnp.ones((3, 3), dtype), "w": jnp.ones((3, 3))}
    tx = build(row, axes={"kernel": fo.MatrixAxes(), "w": fo.MatrixAxes()})
    if row.make is fo.muon and dtype == jnp.complex64:
        assert [leaf.method for leaf in fo.report(tx, params).rows] == ["muon", "muon"]
        return
    for use in (lambda: jax.eval_shape(tx.init, params), lambda: fo.report(tx, params)):
        with pytest.raises(ValueError, match=f"'kernel', which is {jnp.dtype(dtype)}; wanted .*None, the fallback"):
            use()
    tx = build(row, axes={"kernel": None, "w": fo.MatrixAxes()})
    assert fo.report(tx, params).rows[0].method == "fallback"


@each(row for row in METHODS if row.takes_axes)
def test_leaves_that_are_no_real_matrices_move_as_their_fallback_moves_them(row: Row) -> None:
    """Integers too, whose gradients are integers or not. With equal gradients, Adam's steps are equal."""
    whole = {"flag": True, "i": jnp.arange(6).reshape(2, 3), "mixed": jnp.ones((2, 3), jnp.int32), "n": 2}
    params = whole | {"x": 0.5, "z": jnp.asarray([[1 + 2j, 3j], [1.0, -1j]], jnp.complex64)}
    grads = jax.tree.map(lambda p: p, params) | {"mixed": jnp.full((2, 3), 0.5)}
    adamw = optax.adamw(0.1, weight_decay=0.1)
    wanted, _ = adamw.update(grads, adamw.init(params), params)
    tx = build(row, fallback=adamw)
    _, state = tx.update(grads, tx.init(params), params, **row.update_kwargs)  # some make no step at the first call
    updates, _ = tx.update(grads, state, params, **row.update_kwargs)
    for name, u in updates.items():
        assert u.dtype == wanted[name].dtype
        assert jnp.allclose(u, wanted[name], rtol=1e-4, atol=1e-6), name
