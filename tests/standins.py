"""Statistics that follow from the gradient alone, so that every law can run the optimizers that need statistics."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_optax as fo
from fisher_optax._xla import explicit_mesh
from fisher_optax.matrices.axes import arrays
from fisher_optax.matrices.layout import join, layers_of
from fisher_optax.matrices.rules import resolve_axes
from fisher_optax.statistics import LayerFactors, Samples


def factors(G: jax.Array, basis: Any, bias: str | None) -> LayerFactors:
    """Inputs with well-separated second moments; output gradients as large as G; squares as if of one example."""
    d = jnp.arange(1, G.shape[-2] + 1, dtype=G.dtype)
    left = jnp.broadcast_to(jnp.diag(d / 4) + 0.1 * jnp.sin(d[:, None] + d[None]), (*G.shape[:-2], len(d), len(d)))
    squares = None
    if basis is not None:
        squares = jnp.square(basis.left.mT @ G @ basis.right)
    return LayerFactors(left, G.mT @ G, squares, jnp.asarray(4.0), bias)


def samples(G: jax.Array, basis: Any, bias: str | None) -> Samples:
    """Fixed inputs, and the output gradients that they have under G."""
    del basis
    X = np.random.default_rng(7).normal(size=(6, G.shape[-2])).astype(G.dtype)
    given = X
    if bias is not None:
        X[:, -1], given = 1, X[:, :-1]
    inputs = jnp.broadcast_to(given, (*G.shape[:-2], *given.shape))
    return Samples(inputs, X @ G, jnp.asarray(6.0), bias)


def statistics_of(grads: Any, make: Callable[..., Any], bases: Any = None, axes: Any = None) -> Any:
    """A tree like ``grads`` with ``make(G, basis, bias)`` at every kernel, its bias joined, and None elsewhere."""
    leaves, treedef = jax.tree.flatten(grads)
    out: list[Any] = [None] * len(leaves)
    flat = [None] * len(leaves) if bases is None else treedef.flatten_up_to(bases)
    for layer in layers_of(resolve_axes(grads, axes), ("matrix", "head")):
        [G] = join([layer], [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in leaves])
        out[layer.kernel] = make(G, flat[layer.kernel], None if layer.bias is None else "its bias")
    return treedef.unflatten(out)


def fed(factory: Callable[..., Any], make: Callable[..., Any], with_bases: bool = False) -> Any:
    """The factory of an optimizer that makes its own statistics from the gradients it is given."""

    @functools.wraps(factory)
    def build(*args: Any, **options: Any) -> optax.GradientTransformationExtraArgs:
        tx, axes = factory(*args, **options), options.get("axes")

        def made(grads: Any, state: Any, like: Any) -> Any:
            bases = fo.eigenbases(state, like, axes) if with_bases else None
            return statistics_of(grads, make, bases, axes)

        def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            grads = jax.tree.map(jnp.asarray, grads)
            mesh, like = explicit_mesh(grads), grads if params is None else params
            make_here = made if mesh is None else jax.sharding.auto_axes(made, out_sharding=NamedSharding(mesh, P()))
            return tx.update(grads, state, params, statistics=make_here(arrays(grads), state, like), **extra)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return build
