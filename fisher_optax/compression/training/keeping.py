"""Pruned weights stay at zero while the others train.

    g ← g∘M,    u = tx(g, W),    u ← u∘M - W∘(1 - M)

A masked weight W becomes W - W = 0 bit for bit whatever ``tx`` does: momentum, weight decay, a rotation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from ..._arguments import injectable
from ...matrices.axes import arrays, path_names
from ...transforms.skip_nonfinite import skip_nonfinite
from .targets import by_path


class KeepMasksState(NamedTuple):
    """State of `keep_masks`."""

    masks: PyTree  # like the parameters: True where a weight stays; None where nothing is masked
    inner: PyTree


@injectable
def keep_masks(tx: optax.GradientTransformation, masks: PyTree) -> optax.GradientTransformationExtraArgs:
    """``tx``, under which pruned weights stay exactly 0; ones that are not yet become 0 in the first step.

    Masks are part of the state, as a copy, so that a checkpoint has them. A gradient that is not finite skips the whole
    step. `optax.contrib.sam`, which multiplies states, and would make masks integers, goes inside.

    Args:
      tx: any optimizer; other arguments of ``update`` are passed on to it.
      masks: a tree like the parameters, matched by path: boolean arrays shaped like the weights, True for what stays;
        None, also for a whole subtree, where nothing is masked.

    Raises:
      TypeError: for what is no transformation; in ``init``, for masks that are not boolean.
      ValueError: in ``init``, for masks that do not fit the parameters; in ``update``, without ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, fisher_optax as fo
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
      >>> masks = {"kernel": jnp.array([[True, False], [True, True]]), "bias": None}
      >>> tx = fo.compression.keep_masks(optax.adamw(0.5, weight_decay=0.1), masks)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(optax.apply_updates(params, updates)["kernel"].round(2))
      [[0.45 0.  ]
       [0.45 0.45]]
    """
    tx = transformation("keep_masks", tx)

    def init(params: PyTree) -> KeepMasksState:
        return KeepMasksState(_fitting(masks, params), tx.init(params))

    def update(grads: PyTree, state: KeepMasksState, params: PyTree, **extra: PyTree) -> tuple[PyTree, KeepMasksState]:
        updates, inner = tx.update(masked(grads, state.masks), state.inner, params, **extra)
        return masked_updates(updates, params, state.masks), state._replace(inner=inner)

    return wrapper("keep_masks", init, update)


def _fitting(masks: PyTree, params: PyTree) -> PyTree:
    """The masks in the structure of ``params``, which they fit."""

    def fitting(path: KeyPath, W: Array | jax.ShapeDtypeStruct, M: ArrayLike | None) -> Array | None:
        if M is None:
            return None
        name, M = "/".join(path_names(path)), jnp.array(M)  # a copy: whoever donates the state keeps the masks
        if M.dtype != bool:
            raise TypeError(f"masks at {name!r} are {M.dtype}; wanted booleans, True for a weight that stays.")
        if M.shape != W.shape:
            raise ValueError(f"masks at {name!r} have shape {M.shape}; the weights there have {W.shape}.")
        return M

    structure = jax.tree.structure(params)
    return jax.tree.map_with_path(fitting, params, structure.unflatten(by_path("masks", masks, params)))


def masked(grads: PyTree, masks: PyTree) -> PyTree:
    """``g∘M``."""
    return jax.tree.map(lambda g, M: g if M is None else jnp.where(M, g, 0), grads, masks)


def masked_updates(updates: PyTree, params: PyTree, masks: PyTree) -> PyTree:
    """Updates after which a masked weight is 0."""
    return jax.tree.map(lambda u, W, M: u if M is None else jnp.where(M, u, -W), updates, params, masks)


def transformation(name: str, tx: object) -> optax.GradientTransformationExtraArgs:
    """``tx``, which takes any argument. Raises ``TypeError`` for what is none."""
    if not isinstance(tx, optax.GradientTransformation | optax.GradientTransformationExtraArgs):
        raise TypeError(f"{name} wraps an optimizer, e.g. optax.adamw(1e-3); got {type(tx).__name__}.")
    return optax.with_extra_args_support(tx)


def wrapper(
    name: str, init: Callable[..., PyTree], update: Callable[..., tuple[PyTree, PyTree]]
) -> optax.GradientTransformationExtraArgs:
    """A transformation that needs the parameters, and skips gradients that are not finite."""
    tx = skip_nonfinite(optax.GradientTransformationExtraArgs(init, update))

    def with_params(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(
                f"{name} sets weights to 0, but update was called without them: call update(grads, state, params)."
            )
        updates = arrays(updates)
        # The update has the gradient's dtype, and -W must not be rounded.
        wide = jax.tree.map(
            lambda g, W: jnp.asarray(g, jnp.promote_types(*map(jnp.result_type, (g, W)))), updates, params
        )
        return tx.update(wide, state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, with_params)
