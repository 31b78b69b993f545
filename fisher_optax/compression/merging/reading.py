"""What merging is given: trees of one model, Fishers of its leaves, and a weight for each."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from ...fisher import DiagonalFisher
from ...matrices.axes import path_names
from ...matrices.floats import is_floating, without_rest
from ..matrix.checking import require_finite


class Aligned(NamedTuple):
    """Trees of one model, floating-point leaf by leaf."""

    paths: list[str]
    leaves: list[list[Array]]  # of each tree
    structure: Any  # of the first one, with None for what is no floating point
    whole: Callable[[PyTree], PyTree]  # puts back what that is in the first one
    rest: Collection[str]  # the paths of it, in any tree


def aligned(name: str, trees: dict[str, PyTree]) -> Aligned:
    """The leaves of each tree as arrays; errors name path and tree."""
    every = {who: _by_path(tree) for who, tree in trees.items()}
    flat = {who: {path: x for path, x in tree.items() if is_floating(x)} for who, tree in every.items()}
    rest = {path for who, tree in every.items() for path in tree if path not in flat[who]}
    (first, wanted), *_ = flat.items()
    floats, whole = without_rest(trees[first])
    for who, tree in flat.items():
        if mixed := sorted(rest & tree.keys()):
            kinds = ", ".join(f"{jnp.result_type(x[mixed[0]])} in {of}" for of, x in every.items() if mixed[0] in x)
            raise TypeError(f"{name}: {mixed[0]!r} is {kinds}: give trees of one model.")
        if other := sorted(tree.keys() ^ wanted.keys()):
            has, lacks = (who, first) if other[0] in tree else (first, who)
            raise ValueError(f"{name}: {has} has {other[0]!r}, which {lacks} lacks: give trees of one model.")
        for path, x in tree.items():
            if jnp.shape(x) != jnp.shape(wanted[path]):
                shapes = f"{jnp.shape(x)} in {who} and {jnp.shape(wanted[path])} in {first}"
                raise ValueError(f"{name}: {path!r} is {shapes}: give trees of one model.")
            if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
                raise TypeError(f"{name}: {path!r} of {who} is {jnp.result_type(x)}; wanted real floating point.")
            require_finite(name, x, f"{path!r} of {who}", "Take models that have not diverged.")
    leaves = [[jnp.asarray(tree[path]) for path in wanted] for tree in flat.values()]
    return Aligned(list(wanted), leaves, jax.tree.structure(floats), whole, rest)


def _by_path(tree: PyTree) -> dict[str, PyTree]:
    """The leaves, None among them left out."""
    return {"/".join(path_names(path)): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def diagonal_leaves(
    name: str, i: int, fisher: PyTree, paths: list[str], like: list[Array], rest: Collection[str]
) -> list[Array | None]:
    """A diagonal Fisher, leaf by leaf, None where it is; what it has for the ``rest`` is not looked at."""
    tree = fisher.mean if isinstance(fisher, DiagonalFisher) else fisher
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)[0]
    named = (("/".join(path_names(p)), x) for p, x in flat)
    entries = {path: None if x is None else jnp.asarray(x) for path, x in named if path not in rest}
    advice = "Take it by fo.fisher.diagonal(..., groups=None)."
    _require_paths(f"{name}: fishers[{i}]", entries, paths, advice)
    known = {path: entries.get(path) for path in paths}
    for path, x in zip(paths, like, strict=True):
        F = known[path]
        if F is None:
            continue
        if F.shape != x.shape:
            raise ValueError(f"{name}: fishers[{i}] has {F.shape} at {path!r}, the parameter {x.shape}. {advice}")
        require_finite(name, F, f"fishers[{i}] at {path!r}", "Look for NaN or infinity in the data it is from.")
        if not isinstance(F, Tracer) and bool(jnp.any(F < 0)):
            raise ValueError(f"{name}: fishers[{i}] is negative at {path!r}: a Fisher is a mean of squares.")
    return list(known.values())


def _require_paths(who: str, entries: dict[str, Array | None], paths: list[str], advice: str) -> None:
    """A ValueError unless each leaf has an entry or is below a None, and each entry is of a leaf."""
    below = lambda path, root: root == "" or f"{path}/".startswith(f"{root}/")  # noqa: E731
    nothing = [path for path, x in entries.items() if x is None]
    # Flax's collections beside "params", as batch statistics, have no gradients.
    tops = {path.split("/")[0] for path in entries}
    needed = [path for path in paths if "params" not in tops or path.split("/")[0] in tops]
    for path in needed:
        if path not in entries and not any(below(path, root) for root in nothing):
            raise ValueError(
                f"{who} lacks {path!r}, which the models have; None in its place, or above it, is for what is unknown. "
                f"{advice}"
            )
    for path, x in entries.items():
        if path not in paths and not (x is None and any(below(leaf, path) for leaf in paths)):
            raise ValueError(f"{who} has {path!r}, which the models lack. {advice}")


def task_weights(name: str, what: str, weights: Sequence[ArrayLike] | ArrayLike | None, n: int) -> Array:
    """One weight a model, at least 0 and not all 0."""
    if weights is None:
        return jnp.ones(n)
    c = jnp.asarray(weights, jnp.result_type(float))
    if c.shape != (n,):
        raise ValueError(f"{name}: {what} has shape {c.shape}; wanted one number a model, ({n},).")
    if not isinstance(c, Tracer) and not (np.isfinite(c).all() and min(c) >= 0 and max(c) > 0):
        raise ValueError(f"{name}: {what} must be at least 0, finite and not all 0; got {weights!r}.")
    return c
