"""Near shapes in one stack: rows and columns of zeros instead of more programs.

A compiler takes a time for every shape that there is a program for. Of a tree with many shapes, as convolutional
networks have, those that are near are brought to a common one, in a stack called by all of them, e.g.
"9x18+10x20". What is done to a matrix has to leave its zeros alone.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

# No more are left as they are: a transformer has four.
SHAPES = 4
# Down to as many, what zeros may add to a state, as a part of it; and further, in numbers: 256 KiB of float32.
PART, FEW = 0.25, 2**16


class Shape(NamedTuple):
    """The matrices of one shape, or of several that are brought to one."""

    key: str  # as `stack_key` names it; of several, all of them
    stack: tuple[int, ...]  # (N, m, n)
    dtype: str
    factors: bool  # whether both sides have one


@functools.lru_cache(maxsize=256)
def near_shapes(shapes: tuple[Shape, ...]) -> tuple[str, ...]:
    """The names of the stacks. Of more than four shapes pairs are joined, those that add least to the state first: down
    to four, as long as a quarter is added at most, and further, as long as it is next to nothing.

    >>> near_shapes(tuple(Shape(f"{d}x512", (1, d, 512), "float32", True) for d in (64, 512, 256, 480, 128)))
    ('64x512+128x512', '512x512', '256x512', '480x512')
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
    return a._replace(key=f"{a.key}+{b.key}", stack=(N + M, *map(max, own, others)))


def _numbers(shape: Shape) -> int:
    """Of a state: a factor and a basis a side, and two moments."""
    N, m, n = shape.stack
    return 2 * N * (m * n + (m * m + n * n if shape.factors else 0))


def _added(a: Shape, b: Shape) -> int:
    return _numbers(_joined(a, b)) - _numbers(a) - _numbers(b)


def members(key: str) -> list[str]:
    """The shapes in a stack of that name."""
    return key.split("+")


def gather(stacks: Mapping[str, Inexact[Array, "_ _ _"]], keys: Sequence[str]) -> dict[str, Inexact[Array, "N m n"]]:
    """Stacks of these names from those of one shape each.

    >>> x = gather({"1x2": jnp.ones((1, 1, 2)), "2x1": jnp.ones((1, 2, 1))}, ["1x2+2x1"])
    >>> print(x["1x2+2x1"][0])
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


def own_columns(Q: Float[Array, "N D D"], d: int) -> Float[Array, "N d d"]:
    """Of bases whose last coordinates are zeros of `gather`, what is of the first d.

    >>> print(own_columns(jnp.array([[[0.0, 1.0], [1.0, 0.0]]]), 1))
    [[[1.]]]
    """
    if Q.shape[1] == d:
        return Q
    of_zeros = jnp.sum(jnp.square(Q[:, d:]), axis=1) > 0.5
    columns = jnp.argsort(of_zeros, axis=1)[:, None, :d]
    return jnp.take_along_axis(Q[:, :d], columns, axis=2)
