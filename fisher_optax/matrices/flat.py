"""Names with dots, as those of a safetensors file, are paths: what nested dictionaries would say, they say too."""

from collections.abc import Sequence

import jax
from jaxtyping import PyTree

from .axes import LeafAxes, path_names
from .rules import resolve_axes


def read_by_names(params: PyTree) -> list[LeafAxes]:
    """What the rules say of each leaf, in the order of ``jax.tree.leaves``; paths stay those of ``params``.

    >>> [(leaf.path, leaf.kind) for leaf in read_by_names({"lm_head.weight": jax.numpy.ones((3, 5))})]
    [('lm_head.weight', 'head')]
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [path_names(path) for path, _ in flat]
    parts = [tuple(part for name in path for part in name.split(".")) for path in names]
    if parts == names or _collide(parts):
        return resolve_axes(params)
    nested: dict[str, PyTree] = {}
    for path, (_, x) in zip(parts, flat, strict=True):
        node = nested
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = x
    own = {"/".join(path): "/".join(name) for path, name in zip(parts, names, strict=True)}
    read = {leaf.path: leaf for leaf in resolve_axes(nested)}
    return [read[path]._replace(path=name, bias=own.get(read[path].bias or "")) for path, name in own.items()]


def is_told(leaf: LeafAxes) -> bool:
    """Whether a matrix's inputs are known by more than the order of its axes: by a user, a name or a bias.

    >>> [is_told(leaf) for leaf in read_by_names({"kernel": jax.numpy.ones((3, 5)), "table": jax.numpy.ones((3, 5))})]
    [True, False]
    """
    return leaf.bias is not None or "outputs first" in leaf.reason or "2-D leaf" not in leaf.reason


def _collide(paths: Sequence[tuple[str, ...]]) -> bool:
    """Whether two of them are one, or one goes through another."""
    modules = {path[:i] for path in paths for i in range(len(path))}
    joined = {"/".join(path) for path in paths}
    return len(joined) < len(paths) or bool(modules & set(paths))
