"""Trees that could be called, as Equinox and nnx modules are, and must not be."""

from typing import Any

import jax
from flax import nnx


@jax.tree_util.register_pytree_with_keys_class
class Module:
    """A node whose attributes are a tree."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("a tree was called")

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
        names = tuple(sorted(self.fields))
        return [(jax.tree_util.GetAttrKey(name), self.fields[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: Any) -> "Module":
        return cls(**dict(zip(names, children, strict=True)))


class NnxModule(nnx.Module):
    """A module of nnx, whose leaves are in boxes."""

    def __init__(self, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(self, name, value if isinstance(value, NnxModule) else nnx.Param(value))

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("a tree was called")


def module_of(tree: Any, node: type = Module) -> Any:
    """Nested dictionaries as modules with the same names."""
    return node(**{name: module_of(x, node) for name, x in tree.items()}) if isinstance(tree, dict) else tree
