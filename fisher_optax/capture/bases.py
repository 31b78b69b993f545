"""The bases in which squares are taken, one pair for each captured parameter."""

from typing import Any

import jax
import jax.numpy as jnp

from ..matrices.axes import path_names
from .program.leaves import LeafPlan, in_product_order


def bases_of(bases: Any, watched: list[LeafPlan], kind: Any) -> list[Any]:
    """The bases of every watched parameter, in the order in which products take its stack.

    Raises:
      ValueError: where there are none although squares are wanted, or some do not fit.
    """
    if not getattr(kind, "squares", False):
        return [None] * len(watched)
    if bases is None:
        raise ValueError(
            "KroneckerFactors(squares=True) needs bases: grad_fn(..., bases=fo.eigenbases(opt_state, params))."
        )
    found = {"/".join(path_names(p)): b for p, b in jax.tree_util.tree_flatten_with_path(bases, is_leaf=_is_basis)[0]}
    if missing := [leaf.path for leaf in watched if leaf.path not in found]:
        # A layer that the optimizer leaves alone needs no squares: identity bases on both sides.
        found |= dict.fromkeys(missing, (None, None))
    return [tuple(_fitting(leaf, side, Q) for side, Q in enumerate(tuple(found[leaf.path])[:2])) for leaf in watched]


def _fitting(leaf: LeafPlan, side: int, Q: Any) -> Any:
    if Q is None:
        return None
    site = leaf.sites[0]
    d = (site.m + (leaf.bias is not None), site.n)[side]
    batch = tuple(leaf.shape[a] for a in sorted(site.batch_axes))
    if tuple(jnp.shape(Q)) != (*batch, d, d):
        name = ("left", "right")[side]
        bias = leaf.axes.bias if leaf.axes else None
        raise ValueError(
            f"bases of {leaf.path!r}: {name} has shape {jnp.shape(Q)}; wanted {(*batch, d, d)}, since the program uses "
            f"it as {leaf.axes}{f' with bias {bias!r}' if bias else ''}. Where the optimizer reads it otherwise, give "
            "it and fo.eigenbases axes=fo.infer_axes(loss_fn, params, batch), and start its state anew."
        )
    return in_product_order(Q, leaf)


def _is_basis(x: Any) -> bool:
    return isinstance(x, tuple) and "left" in getattr(x, "_fields", ())
