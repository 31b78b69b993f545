"""What a tree of parameters may be made of: nodes that could be called."""

from typing import Any

import jax

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
