"""The bases inside an optimizer's state, by parameter: what capture needs to take squares in them."""

from typing import Any

import jax

from .axes import resolve_axes
from .layers import layers_of
from .matrices import stack_key
from .seam import PreconditionState
from .types import Eigenbasis


def eigenbases(state: Any, params: Any, axes: Any = None) -> Any:
    """A tree like ``params`` with the `Eigenbasis` of each layer that the optimizer has one for, None elsewhere.

    Args:
      state: of `fo.ekfac` or another optimizer of layers, however deep in chains.
      params: what it optimizes.
      axes: the optimizer's ``axes``.

    Raises:
      ValueError: where ``state`` has no bases of these layers, or those of blocks.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> fo.eigenbases(fo.ekfac(0.1).init(params), params)["kernel"].left.shape
      (5, 5)
    """
    is_state = lambda x: isinstance(x, PreconditionState)  # noqa: E731
    found = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    leaves, treedef = jax.tree.flatten(params)
    layers = layers_of(resolve_axes(params, axes), ("matrix", "head"))
    taken: dict[str, int] = {}
    bases: list[Any] = [None] * len(leaves)
    for layer in layers:
        *batch, m, n = layer.shape(leaves)
        key = stack_key((m, n), jax.numpy.promote_types(leaves[layer.kernel].dtype, jax.numpy.float32))
        if len(found) != 1 or key not in found[0].matrices:
            raise ValueError(
                f"eigenbases: the state has no bases of {m} x {n} matrices, as {layer.path!r} is. Pass the state of "
                "fo.ekfac (without block_size) with the params and the axes it was made for."
            )
        start, count = taken.get(key, 0), (batch or [1])[0]
        taken[key] = start + count
        shape = tuple(leaves[layer.kernel].shape[a] for a in layer.axes.batch)
        kept = found[0].matrices[key].basis
        bases[layer.kernel] = Eigenbasis(
            *(None if Q is None else Q[start : start + count].reshape(*shape, *Q.shape[1:]) for Q in kept[:2])
        )
    return treedef.unflatten(bases)
