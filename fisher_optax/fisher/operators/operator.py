"""A symmetric matrix as large as a model's parameters: what it does to a tree, never its entries."""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.lax import Precision
from jax.tree_util import tree_flatten_with_path
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from ..._xla import automatic, of_each
from ...matrices.axes import path_names
from ...matrices.floats import without_rest


class Rule(abc.ABC):
    """How an operator acts. Equal rules are one program, so they are frozen dataclasses."""

    @abc.abstractmethod
    def product(self, data: PyTree, v: PyTree) -> PyTree:
        """Of the matrix and a tree."""


class RowRule(Rule):
    """How one acts that is a sum of outer products."""

    @abc.abstractmethod
    def rows(self, data: PyTree) -> Array:
        """R of (rows, D) with ``RᵀR`` the matrix."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data",),
    meta_fields=("name", "rule", "structure", "paths", "leaves"),
)
@dataclasses.dataclass(frozen=True)
class Operator:
    """A symmetric D x D matrix on trees like the parameters, in the order of `jax.flatten_util.ravel_pytree`.

    ``operator.matvec(tree)``, or ``operator @ tree``, is the product. It may be handed to a jitted function: its arrays
    are arguments there, not constants.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> A = fo.fisher.Operator.from_dense(jnp.diag(jnp.array([1.0, 2.0, 3.0])), {"w": jnp.ones(2), "b": jnp.ones(())})
      >>> print(A @ {"w": jnp.ones(2), "b": jnp.ones(())})
      {'b': Array(1., dtype=float32), 'w': Array([2., 3.], dtype=float32)}
    """

    name: str
    rule: Rule
    data: PyTree  # the arrays that the rule reads
    structure: Hashable  # a PyTreeDef
    paths: tuple[str, ...]
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def on(cls, name: str, rule: Rule, data: PyTree, like: PyTree) -> "Operator":
        """An operator on trees like ``like``, of arrays or `jax.ShapeDtypeStruct`: on its floating-point leaves."""
        like, _ = without_rest(like)
        flat, structure = tree_flatten_with_path(like)
        leaves = tuple(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for _, x in flat)
        return cls(name, rule, data, structure, tuple("/".join(path_names(p)) for p, _ in flat), leaves)

    @classmethod
    def from_matvec(cls, matvec: Callable[[PyTree], PyTree], like: PyTree) -> "Operator":
        """From a function of trees like ``like``, which has to be linear and symmetric."""
        return cls.on("matvec", Matvec(matvec), (), like)

    @classmethod
    def from_dense(cls, matrix: ArrayLike, like: PyTree, name: str = "dense") -> "Operator":
        """From its D x D entries, in the order of `jax.flatten_util.ravel_pytree`.

        Raises:
          ValueError: where its size is not that of ``like``.
        """
        made = cls.on(name, Dense(), jnp.asarray(matrix), like)
        if jnp.shape(matrix) != (made.size, made.size):
            wanted = f"{made.size} x {made.size}"
            raise ValueError(f"a tree of {made.size} numbers needs a {wanted} matrix; got shape {jnp.shape(matrix)}.")
        return made

    @property
    def size(self) -> int:
        """D, the number of parameters."""
        return sum(math.prod(x.shape) for x in self.leaves)

    @property
    def dtype(self) -> np.dtype:
        """Of a raveled tree."""
        return jnp.result_type(*(x.dtype for x in self.leaves))

    def matvec(self, v: PyTree) -> PyTree:
        """The product with a tree; integers, booleans and random states in it pass through.

        Raises:
          ValueError: for a tree of another structure or other shapes.
        """
        v, whole = without_rest(v)
        found = jax.tree.structure(v)
        if found != self.structure:
            raise ValueError(f"{self.name}: a tree like the parameters is wanted, {self.structure}; got {found}.")
        for path, x, wanted in zip(self.paths, jax.tree.leaves(v), self.leaves, strict=True):
            if jnp.shape(x) != wanted.shape:
                raise ValueError(
                    f"{self.name}: {path!r} has shape {jnp.shape(x)}; wanted the parameter's, {wanted.shape}."
                )
        v = jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), v, jax.tree.unflatten(self.structure, self.leaves))
        return whole(self.rule.product(self.data, v))

    def __matmul__(self, v: PyTree) -> PyTree:
        return self.matvec(v)

    def ravel(self, tree: PyTree) -> Array:
        """A tree as one vector."""
        return jnp.concatenate([jnp.ravel(x).astype(self.dtype) for x in jax.tree.leaves(tree)])

    def unravel(self, x: Array) -> PyTree:
        """The inverse of `ravel`."""
        leaves, start = [], 0
        for like in self.leaves:
            n = math.prod(like.shape)
            leaves.append(x[start : start + n].reshape(like.shape).astype(like.dtype))
            start += n
        return jax.tree.unflatten(self.structure, leaves)

    @property
    def has_rows(self) -> bool:
        """Whether it is given as a sum of outer products, one a row of `rows`."""
        return isinstance(self.rule, RowRule)

    def rows(self) -> Float[Array, "r d"]:
        """R with ``RᵀR`` the matrix: scores of single labels and examples, scaled. As many backward passes as rows.

        Raises:
          ValueError: where the matrix is not given as such a sum.
        """
        if not isinstance(self.rule, RowRule):
            raise ValueError(f"{self.name} is no sum of outer products: use matvec or dense.")
        return _rows(self.rule, self.data)

    def dense(self, batch_size: int = 32) -> Float[Array, "d d"]:
        """All D² entries: for small models. From the rows where they are fewer than D, else D products, ``batch_size``
        at a time.
        """
        return _dense(self, batch_size)

    def block(self, paths: str | Sequence[str]) -> "Operator":
        """The diagonal block of the leaves below these paths (``"head"``, ``"Block_0/attention"``), on a list of them.

        Raises:
          ValueError: for a path with no leaf below it.
        """
        paths = (paths,) if isinstance(paths, str) else tuple(paths)
        inside = lambda path, of: path == of or path.startswith(f"{of}/")  # noqa: E731
        for wanted in paths:
            if not any(inside(path, wanted) for path in self.paths):
                raise ValueError(f"no leaf below {wanted!r}; there are {', '.join(map(repr, self.paths[:8]))}, ...")
        chosen = tuple(i for i, path in enumerate(self.paths) if any(inside(path, of) for of in paths))
        names = tuple(self.paths[i] for i in chosen)
        leaves = tuple(self.leaves[i] for i in chosen)
        cut = RowBlock if self.has_rows else Block
        rule = cut(self.rule, self.structure, self.leaves, chosen)
        name, structure = f"{self.name} of {', '.join(paths)}", jax.tree.structure([0] * len(names))
        return Operator(name, rule, self.data, structure, names, leaves)


@functools.partial(jax.jit, static_argnums=0)
def _rows(rule: RowRule, data: PyTree) -> Array:
    return automatic(rule.rows, data)


@functools.partial(jax.jit, static_argnums=1)
def _dense(F: Operator, batch_size: int) -> Array:
    return automatic(functools.partial(_by_entries, batch_size=batch_size), F)


def _by_entries(F: Operator, batch_size: int) -> Array:
    if isinstance(F.rule, Dense):
        return F.data
    if F.has_rows and jax.eval_shape(lambda: F.rows()).shape[0] < F.size:
        R = F.rows()
        return jnp.matmul(R.T, R, precision=Precision.HIGHEST)
    A = of_each(lambda e: F.ravel(F @ F.unravel(e)), jnp.eye(F.size, dtype=F.dtype), batch_size=batch_size)
    return (A + A.T) / 2


@dataclasses.dataclass(frozen=True)
class Matvec(Rule):
    """Any function."""

    matvec: Callable[[PyTree], PyTree]

    def product(self, data: PyTree, v: PyTree) -> PyTree:
        del data
        return self.matvec(v)


@dataclasses.dataclass(frozen=True)
class Dense(Rule):
    """All entries."""

    def product(self, data: Array, v: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(v)
        return unravel(jnp.matmul(data, flat, precision=Precision.HIGHEST).astype(flat.dtype))


@dataclasses.dataclass(frozen=True)
class Block(Rule):
    """The leaves ``chosen`` of another operator's, as a list."""

    whole: Rule  # of that operator
    structure: Hashable  # a PyTreeDef
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    chosen: tuple[int, ...]

    def product(self, data: PyTree, v: PyTree) -> PyTree:
        full = [jnp.zeros(x.shape, x.dtype) for x in self.leaves]
        for i, x in zip(self.chosen, v, strict=True):
            full[i] = x
        out = jax.tree.leaves(self.whole.product(data, jax.tree.unflatten(self.structure, full)))
        return [out[i] for i in self.chosen]


@dataclasses.dataclass(frozen=True)
class RowBlock(Block, RowRule):
    """The same of one that has rows: their entries there."""

    def rows(self, data: PyTree) -> Array:
        ends = [0, *itertools.accumulate(math.prod(x.shape) for x in self.leaves)]
        assert isinstance(self.whole, RowRule)
        R = self.whole.rows(data)
        return jnp.concatenate([R[:, ends[i] : ends[i + 1]] for i in self.chosen], 1)
