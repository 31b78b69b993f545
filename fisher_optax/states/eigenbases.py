"""The bases inside an optimizer's state, by parameter: what capture needs to take squares in them."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ..matrices.axes import wide_dtype
from ..matrices.blocks import stack_key
from ..matrices.layout import layers_of
from ..matrices.near import members, own_columns
from ..matrices.rules import resolve_axes
from ..preconditioner.contracts import Eigenbasis
from ..preconditioner.transform import PreconditionState


def eigenbases(state: PyTree, params: PyTree, axes: PyTree = None) -> PyTree:
    """A tree like ``params`` with the `Eigenbasis` of each layer that the optimizer has one for, None elsewhere.

    Args:
      state: of `fo.ekfac` or another optimizer of layers, however deep in chains.
      params: what it optimizes.
      axes: the optimizer's ``axes``.

    Raises:
      ValueError: where ``state`` has no bases of these layers, or those of blocks or of other layers.

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
    stacks = {own: key for state in found for key in state.matrices for own in members(key)}
    used: dict[str, int] = {}
    places = []
    for layer in layers:
        *batch, m, n = layer.shape(leaves)
        key = stack_key((m, n), jnp.promote_types(wide_dtype(leaves[layer.kernel].dtype), jnp.float32))
        if len(found) != 1 or key not in stacks:
            raise ValueError(
                f"eigenbases: the state has no bases of {m} x {n} matrices, as {layer.path!r} is. Pass the state of "
                "fo.ekfac (without block_size) with the params and the axes it was made for."
            )
        start = used.get(key, 0)
        used[key] = start + (batch or [1])[0]
        places.append((key, start, (m, n)))
    for optimizer_state in found:
        _require_all(used, optimizer_state)
    bases: list[Eigenbasis | None] = [None] * len(leaves)
    for layer, (key, start, sides) in zip(layers, places, strict=True):
        shape = tuple(leaves[layer.kernel].shape[a] for a in layer.axes.batch)
        shared = members(stacks[key])
        start += sum(used[own] for own in shared[: shared.index(key)])
        place = slice(start, start + math.prod(shape))
        basis = found[0].matrices[stacks[key]].basis
        bases[layer.kernel] = Eigenbasis(
            *(
                None if Q is None else own_columns(Q[place], d).reshape(*shape, d, d)
                for Q, d in zip(basis[:2], sides, strict=True)
            )
        )
    return treedef.unflatten(bases)


def _require_all(used: dict[str, int], state: PreconditionState) -> None:
    """A ValueError unless as many matrices of each shape were used as the state has: else some are another layer's."""
    stacks = state.matrices if isinstance(state.matrices, dict) else {}
    for key, leaves in ((key, jax.tree.leaves(stack)) for key, stack in stacks.items()):
        count = sum(used.get(own, 0) for own in members(key))
        have = len(leaves[0]) if leaves else count
        # A stack that is shared out over a mesh is filled up by fewer matrices than there are devices.
        if count != have and not 0 < count < have < count + jax.device_count():
            raise ValueError(
                f"eigenbases: the state has bases of {have} matrices of shape {key}, and these params and axes have "
                f"{count}. Pass the params and the axes= that the optimizer was made for."
            )
