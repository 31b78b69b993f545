"""The bases in which squares are taken, one pair for each captured parameter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ..matrices.axes import path_names
from .kinds.protocol import Bases, StatisticsKind
from .program.leaves import LeafPlan, in_product_order


def bases_of(bases: PyTree, watched: list[LeafPlan], kind: StatisticsKind) -> list[Bases | None]:
    """The bases of every watched parameter, in the order in which products take its stack.

    Raises:
      ValueError: where there are none although squares are wanted, or some do not fit.
    """
    if not kind.needs_bases():
        return [None] * len(watched)
    if bases is None:
        raise ValueError(
            "KroneckerFactors(squares=True) needs bases: grad_fn(..., bases=fo.eigenbases(opt_state, params))."
        )
    found = {"/".join(path_names(p)): b for p, b in jax.tree_util.tree_flatten_with_path(bases, is_leaf=_is_basis)[0]}
    if missing := [leaf.path for leaf in watched if leaf.path not in found]:
        # A layer that the optimizer leaves alone needs no squares: identity bases on both sides.
        found |= dict.fromkeys(missing, (None, None))
    pairs = [(leaf, found[leaf.path]) for leaf in watched]
    return [(_fitting(leaf, 0, pair[0]), _fitting(leaf, 1, pair[1])) for leaf, pair in pairs]


def _fitting(leaf: LeafPlan, side: int, Q: Array | None) -> Array | None:
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


def _is_basis(x: object) -> bool:
    return isinstance(x, tuple) and "left" in getattr(x, "_fields", ())
