"""A step of one matrix, and of all matrices of one stack; which shapes share one; what is kept between steps."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from .. import linalg
from .._xla import select
from ..linalg.eigenbasis import LowRank
from ..matrices.blocks import over_stack
from ..statistics import LayerFactors
from .contracts import Application, Eigenpairs, FactorRule, Kronecker, MatrixState
from .refresh import START


class Store(NamedTuple):
    """`fo.Storage`, as far as it is about factors and bases, and the longest side that has one."""

    dtype: DTypeLike | None = None
    packed: bool = False
    sides: str = "both"
    max_dim: int = 10_000
    block_size: int | None = None

    @property
    def plain(self) -> bool:
        """Whether factors are kept as they come."""
        return self.dtype is None and not self.packed

    def wanted(self, m: int, n: int) -> tuple[bool, bool]:
        """Which sides of an ``m x n`` matrix get a factor."""
        if self.sides == "left":
            return m <= self.max_dim, False
        both = self.sides == "both"
        return m <= self.max_dim and (both or m <= n), n <= self.max_dim and (both or n < m)

    def store(self, factors: Kronecker) -> Kronecker:
        """Full symmetric factors as they are kept."""

        def stored(A: Array | LowRank) -> Array | LowRank:
            if isinstance(A, LowRank):
                return A if self.dtype is None else LowRank(A.rows.astype(self.dtype))
            return self._pack(A if self.dtype is None else A.astype(self.dtype))

        return each_side(stored, factors)

    def load(self, factors: Kronecker, m: int, n: int, dtype: DTypeLike) -> Kronecker:
        """The kept factors of an ``m x n`` matrix, full and in ``dtype``."""

        def whole(A: Array | LowRank | None, d: int) -> Array | LowRank | None:
            if A is None:
                return None
            return LowRank(A.rows.astype(dtype)) if isinstance(A, LowRank) else self._unpack(A, d).astype(dtype)

        return factors._replace(left=whole(factors.left, m), right=whole(factors.right, n))

    def identity(self, factors: Kronecker, returns: type) -> PyTree:
        """The basis before there is any: the identity on each side that has a factor, as far as its rank goes."""
        sides = [A.rows if isinstance(A, LowRank) else A for A in (factors.left, factors.right)]
        eyes = [None if A is None else jnp.eye(A.shape[-1], len(A), dtype=self.dtype or A.dtype) for A in sides]
        ones = [None if A is None else jnp.ones(len(A), A.dtype) for A in sides]
        return returns(*eyes, *ones) if returns is Eigenpairs else returns(*eyes)

    def _pack(self, A: Array) -> Array:
        return linalg.pack(A) if self.packed else A

    def _unpack(self, A: Array, d: int) -> Array:
        return linalg.unpack(A, d) if self.packed else A


def each_side(f: Callable[[Any], Array | LowRank], factors: Kronecker) -> Kronecker:
    """``f`` of each factor that there is."""
    L, R = factors.left, factors.right
    return factors._replace(left=None if L is None else f(L), right=None if R is None else f(R))


@dataclasses.dataclass(frozen=True)
class Step:
    """What happens to a matrix at one call, but for the refresh of its bases.

    A gradient that acts on itself (Shampoo, K-FAC) is observed, then bases are refreshed, then it is applied; one that
    acts in bases of earlier ones (SOAP) is observed and applied at once, and bases are refreshed afterwards.
    """

    rule: FactorRule
    application: Application
    storage: Store
    skip_first: bool
    max_stack: int
    extra: dict[str, PyTree]  # more arguments of the application
    accept: Bool[Array, ""] | None  # whether to change any state at all; None: it is

    def observe(
        self, G: Float[Array, "m n"], state: MatrixState, statistics: LayerFactors | None, alone: bool
    ) -> MatrixState:
        """Factors, eigenvalues and what the application keeps of statistics, after the gradient, or its layer's
        statistics, if there are any. ``alone`` in its stack, or one of several.
        """
        rule, new = self.rule, state
        if self.application.observe is not None and statistics is not None:
            inner = self.application.observe(state.application, statistics, state.basis)
            new = new._replace(application=select(self.accept, inner, state.application))
        observed = statistics if rule.of_statistics else G
        if observed is None:
            return new
        # One of several is a slice of its stack, and copied in any case.
        if alone and rule.overwrite is not None and self.storage.plain:
            return new._replace(factors=rule.overwrite(observed, state.factors, self.accept))
        m, n = G.shape
        old = self.storage.load(state.factors, m, n, G.dtype)
        if rule.track is not None:
            new = new._replace(basis=select(self.accept, rule.track(observed, old, state.basis), state.basis))
        factors = self.storage.store(rule.update(observed, old, state.basis))
        return new._replace(factors=select(self.accept, factors, state.factors))

    def apply(
        self, G: Float[Array, "m n"], inner: PyTree, basis: PyTree, action: Int[Array, ""]
    ) -> tuple[Float[Array, "m n"], PyTree]:
        """The direction and the application's new state."""
        U, new = self.application.update(G, inner, basis, **self.extra)
        if self.skip_first:
            first = action == START
            U = jnp.where(first, 0, U)
            new = jax.tree.map(lambda x, old: jnp.where(first, old, x), new, inner)
        return U, select(self.accept, new, inner)

    def observe_stack(
        self, G: Float[Array, "N m n"], state: MatrixState, statistics: LayerFactors | None
    ) -> MatrixState:
        """`observe`, of all matrices of a stack."""
        if statistics is None and self.rule.of_statistics:
            return state

        def observe(factors: Any, copied: Any, read: Any) -> tuple[Any, Any]:
            (values, inner), (G, vectors, statistics) = copied, read
            old = MatrixState(factors, type(state.basis)(*vectors, *values), inner)
            new = self.observe(G, old, statistics, alone=len(stack) == 1)
            return new.factors, (tuple(new.basis[2:]), new.application)

        stack, vectors, values = G, tuple(state.basis[:2]), tuple(state.basis[2:])
        copied, read = (values, state.application), (G, vectors, statistics)
        factors, (values, inner) = over_stack(observe, state.factors, copied, read, max_stack=self.max_stack)
        return MatrixState(factors, type(state.basis)(*vectors, *values), inner)

    def apply_stack(
        self, G: Float[Array, "N m n"], state: MatrixState, action: Int[Array, " N"]
    ) -> tuple[Float[Array, "N m n"], MatrixState]:
        """`apply`, of all matrices of a stack."""

        def apply(overwritten: tuple[()], inner: Any, read: Any) -> tuple[tuple[()], Any]:
            return overwritten, self.apply(read[0], inner, *read[1:])

        # A gradient whose application keeps its squares would be copied whole, for each matrix, to be overwritten.
        read = (G, state.basis, action)
        _, (U, inner) = over_stack(apply, (), state.application, read, max_stack=self.max_stack)
        return U, state._replace(application=inner)

    def stack(
        self,
        G: Float[Array, "N m n"],
        state: MatrixState,
        statistics: LayerFactors | None,
        action: Int[Array, " N"],
    ) -> tuple[Float[Array, "N m n"], MatrixState]:
        """Both of them, of all matrices of a stack."""

        def both(overwritten: Any, copied: Any, read: Any) -> tuple[Any, Any]:
            (G, factors), (values, inner), (vectors, statistics, action) = overwritten, copied, read
            old = MatrixState(factors, type(state.basis)(*vectors, *values), inner)
            new = self.observe(G, old, statistics, alone=len(stack) == 1)
            U, inner = self.apply(G, new.application, new.basis, action)
            return (U, new.factors), (tuple(new.basis[2:]), inner)

        stack, vectors, values = G, tuple(state.basis[:2]), tuple(state.basis[2:])
        copied, read = (values, state.application), (vectors, statistics, action)
        (U, factors), (values, inner) = over_stack(both, (G, state.factors), copied, read, max_stack=self.max_stack)
        return U, MatrixState(factors, type(state.basis)(*vectors, *values), inner)


# Near shapes in one stack: rows and columns of zeros instead of more programs.
#
# A compiler takes a time for every shape that there is a program for. Of a tree with many shapes, as convolutional
# networks have, those that are near are brought to a common one, in a stack that is called by all of them and how many
# there are of each, e.g. "1*9x18+4*10x20". What is done to a matrix has to leave its zeros alone.


# No more are left as they are: a transformer has four.
SHAPES = 4
# Down to as many, what zeros may add to a state, as a part of it; and further, in numbers: 256 KiB of float32.
PART, FEW = 0.25, 2**16


class Shape(NamedTuple):
    """The matrices of one shape, or of several that are brought to one."""

    key: str  # as `stack_key` names it; of several, all of them, with how many there are of each
    stack: tuple[int, ...]  # (N, m, n)
    dtype: str
    factors: bool  # whether both sides have one


@functools.lru_cache(maxsize=256)
def near_shapes(shapes: tuple[Shape, ...]) -> tuple[str, ...]:
    """The names of the stacks. Of more than four shapes pairs are joined, those that add least to the state first: down
    to four, as long as a quarter is added at most, and further, as long as it is next to nothing.

    >>> near_shapes(tuple(Shape(f"{d}x512", (1, d, 512), "float32", True) for d in (64, 512, 256, 480, 128)))
    ('1*64x512+1*128x512', '512x512', '256x512', '480x512')
    """
    stacks, added = list(shapes), 0
    part = PART * sum(_numbers(stack) for stack in stacks)
    while len(shapes) > SHAPES:
        # Of a single factor, some rules take the mean over the other side.
        pairs = [(a, b) for a, b in itertools.combinations(stacks, 2) if a.dtype == b.dtype and a.factors and b.factors]
        if not pairs:
            break
        a, b = min(pairs, key=lambda pair: _added(*pair))
        added += _added(a, b)
        if added > (max(FEW, part) if len(stacks) > SHAPES else FEW):
            break
        stacks = [_joined(a, b) if stack is a else stack for stack in stacks if stack is not b]
    return tuple(stack.key for stack in stacks)


def _joined(a: Shape, b: Shape) -> Shape:
    (N, *own), (M, *others) = a.stack, b.stack
    key = "+".join(x.key if "*" in x.key else f"{x.stack[0]}*{x.key}" for x in (a, b))
    return a._replace(key=key, stack=(N + M, *map(max, own, others)))


def _numbers(shape: Shape) -> int:
    """Of a state: a factor and a basis a side, and two moments."""
    N, m, n = shape.stack
    return 2 * N * (m * n + (m * m + n * n if shape.factors else 0))


def _added(a: Shape, b: Shape) -> int:
    return _numbers(_joined(a, b)) - _numbers(a) - _numbers(b)


def members(key: str) -> dict[str, int | None]:
    """The shapes in a stack of that name, in order, and how many matrices there are of each; None: all of them.

    >>> members("1*9x18+4*10x20"), members("4x6")
    ({'9x18': 1, '10x20': 4}, {'4x6': None})
    """
    parts = [part.rpartition("*") for part in key.split("+")]
    return {own: int(count) if count else None for count, _, own in parts}


def gather(stacks: Mapping[str, Inexact[Array, "_ _ _"]], keys: Sequence[str]) -> dict[str, Inexact[Array, "N m n"]]:
    """Stacks of these names from those of one shape each.

    >>> x = gather({"1x2": jnp.ones((1, 1, 2)), "2x1": jnp.ones((1, 2, 1))}, ["1*1x2+1*2x1"])
    >>> print(x["1*1x2+1*2x1"][0])
    [[1. 1.]
     [0. 0.]]
    """
    return {key: _together([stacks[own] for own in members(key)]) for key in keys}


def _together(stacks: list[Array]) -> Array:
    if len(stacks) == 1:
        return stacks[0]
    m, n = (max(x.shape[axis] for x in stacks) for axis in (1, 2))
    return jnp.concatenate([jnp.pad(x, ((0, 0), (0, m - x.shape[1]), (0, n - x.shape[2]))) for x in stacks])


def scatter(
    stacks: Mapping[str, Inexact[Array, "_ _ _"]], like: Mapping[str, Inexact[Array, "_ _ _"]]
) -> dict[str, Inexact[Array, "_ _ _"]]:
    """The stacks of one shape each again, as long and large as those of ``like``: the inverse of `gather`."""
    own = {}
    for key, stack in stacks.items():
        start = 0
        for name in members(key):
            count, m, n = like[name].shape
            own[name] = stack if len(members(key)) == 1 else stack[start : start + count, :m, :n]
            start += count
    return own


def own_columns(Q: Float[Array, "N D k"], d: int) -> Float[Array, "N d j"]:
    """Of bases whose last coordinates are zeros of `gather`, what is of the first d.

    >>> print(own_columns(jnp.array([[[0.0, 1.0], [1.0, 0.0]]]), 1))
    [[[1.]]]
    """
    if Q.shape[1] == d:
        return Q
    of_zeros = jnp.sum(jnp.square(Q[:, d:]), axis=1) > 0.5
    columns = jnp.argsort(of_zeros, axis=1)[:, None, :d]
    return jnp.take_along_axis(Q[:, :d], columns, axis=2)
