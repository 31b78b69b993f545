"""Which weights go: the k of smallest score, ties to the lower index, or all but N of each M inputs.

A mask is True where a weight stays. Kernels and scores are ``(*batch, inputs, outputs)``, as Flax stores kernels. A
sparsity is a share of weights to remove, in [0, 1), which removes ``k = ⌈s n⌉`` of the n in each scope; or "N:M", which
keeps N of every M consecutive inputs of an output (NVIDIA's reading: "2:4" and "1:4" keep 2 and 1 of 4).
"""

import functools
import math
import re
from typing import NamedTuple, TypeAlias, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

SCOPES = ("matrix", "output")
WANTED = "a share of weights to remove, at least 0 and below 1, or 'N:M' to keep N of every M inputs, as '2:4'"


class Pattern(NamedTuple):
    """``keep`` of every ``of`` consecutive inputs stay."""

    keep: int
    of: int

    @property
    def share(self) -> float:
        """Of the weights that go."""
        return 1 - self.keep / self.of


Sparsity: TypeAlias = ArrayLike | str | Pattern  # a share, which may be traced, or "N:M"
ReadSparsity: TypeAlias = float | Tracer | Pattern  # what `as_sparsity` makes of it


def as_sparsity(sparsity: Sparsity) -> ReadSparsity:
    """A number, a traced number or a `Pattern`, from what a user gives.

    Raises:
      TypeError, ValueError: for anything else, and a share outside of [0, 1).

    >>> as_sparsity("2:4")
    Pattern(keep=2, of=4)
    """
    if isinstance(sparsity, Pattern):
        return sparsity
    if isinstance(sparsity, str):
        found = re.fullmatch(r"(\d+):(\d+)", sparsity)
        if not found or not 0 < int(found[1]) <= int(found[2]):
            raise ValueError(f"sparsity must be {WANTED}; got {sparsity!r}.")
        return Pattern(int(found[1]), int(found[2]))
    if isinstance(sparsity, Tracer):
        return sparsity
    if isinstance(sparsity, bool) or np.ndim(sparsity) or np.asarray(sparsity).dtype.kind not in "iuf":
        raise TypeError(f"sparsity must be {WANTED}; got {sparsity!r}.")
    share = float(str(np.asarray(sparsity)))  # a float32 of 0.55 is meant as 0.55
    if not 0 <= share < 1:
        raise ValueError(f"sparsity must be {WANTED}; got {sparsity!r}.")
    return share


def check_pattern(pattern: Pattern, inputs: int) -> None:
    """Raises ``ValueError`` where groups of M do not fill the inputs."""
    if inputs % pattern.of:
        raise ValueError(
            f"{pattern.keep}:{pattern.of} needs inputs in groups of {pattern.of}; this kernel has {inputs}, which "
            f"{pattern.of} does not divide. Leave the layer out, or give it a share."
        )


@overload
def count(sparsity: float, n: int) -> int: ...
@overload
def count(sparsity: float | Array, n: int) -> int | Int[Array, ""]: ...
def count(sparsity: float | Array, n: int) -> int | Int[Array, ""]:
    """``⌈s n⌉``, never one more for the rounding of s: 0.55 of 100 is 55. A traced s is rounded as float32 has it."""
    if isinstance(sparsity, int | float):
        return math.ceil(sparsity * n * (1 - 1e-12))
    return jnp.ceil(sparsity * n * (1 - 2e-7)).astype(jnp.int32)


def mask(scores: ArrayLike, sparsity: Sparsity, scope: str = "matrix") -> Bool[Array, "*batch inputs outputs"]:
    """True for the weights that stay: all but the k of smallest score, ties by index.

    Args:
      scores: ``(*batch, inputs, outputs)``, larger for what matters more. NaN counts as the largest.
      sparsity: a share or "N:M" (see the top of this file). A share may be traced.
      scope: what k is counted in: "matrix" (each matrix; ties in row-major order) or "output" (each output's inputs, as
        Wanda does). "N:M" is by output.

    Raises:
      TypeError, ValueError: for another sparsity or scope, and an M that does not divide the inputs.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> scores = jnp.array([[1.0, 4.0], [1.0, 3.0], [2.0, 9.0], [0.0, 2.0]])
      >>> print(fo.compression.mask(scores, 0.5).astype(int).T)
      [[0 0 0 0]
       [1 1 1 1]]
      >>> print(fo.compression.mask(scores, "2:4").astype(int).T)
      [[0 1 1 0]
       [1 0 1 0]]
    """
    scores, sparsity = jnp.asarray(scores), as_sparsity(sparsity)
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(map(repr, SCOPES))}; got {scope!r}.")
    *batch, m, n = scores.shape
    if isinstance(sparsity, Pattern):
        check_pattern(sparsity, m)
        groups = scores.reshape(*batch, m // sparsity.of, sparsity.of, n)
        stays = keep_largest(groups, sparsity.of - sparsity.keep, -2)
    elif scope == "output":
        stays = keep_largest(scores, count(sparsity, m), -2)
    else:
        stays = keep_largest(scores.reshape(*batch, m * n), count(sparsity, m * n))
    return stays.reshape(scores.shape)


@functools.partial(jax.jit, static_argnames="axis")
def keep_largest(scores: Float[Array, "..."], k: int | Int[Array, ""], axis: int | None = -1) -> Bool[Array, "..."]:
    """False for exactly the k smallest along an axis (None: of all), the first of those that are equal.

    The bits of floats, taken as whole numbers, are in the floats' order, so that the k-th is found bit by bit: on a CPU
    much faster than by sorting (``benchmarks/speed/compression_speed.py``).

    >>> print(keep_largest(jnp.array([2.0, 0.0, 1.0, 1.0]), 2))
    [ True False False  True]
    """
    keys = _in_order(scores)
    size = scores.size if axis is None else scores.shape[axis]
    word, v, below, level = keys.dtype, jnp.zeros([], keys.dtype), jnp.zeros([], jnp.int32), jnp.ones(keys.shape, bool)
    # By 16 bits at a time, which are twice as many to a register; of the lower ones only where the upper are level.
    for shift in reversed(range(0, word.itemsize * 8, 16)):
        digits = jnp.where(level, (keys >> shift).astype(jnp.uint16), jnp.uint16(2**16 - 1))
        digit, more = _kth(digits, k - below, axis, 16)
        v, below, level = v | (digit.astype(word) << shift), below + more, level & (digits == digit)

    def by_place() -> Array:
        """All below v go, and of those equal to v the first."""
        shape = scores.shape if axis is None else [size if a == axis % scores.ndim else 1 for a in range(scores.ndim)]
        place = jnp.arange(size, dtype=word).reshape(shape)
        ties = keys == v
        first, _ = _kth(jnp.where(ties, place, size), k - below, axis, size.bit_length())
        return (keys > v) | (ties & (place >= first))

    return jax.lax.cond(jnp.any(below < k), by_place, lambda: keys >= v)


def _in_order(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Whole numbers that are ordered as x, NaN last and -0 with 0."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    word = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint64
    bits, sign = jax.lax.bitcast_convert_type(x, word), jnp.ones([], word) << (x.dtype.itemsize * 8 - 1)
    keys = jnp.where((bits < sign) | (bits == sign), bits | sign, ~bits)
    return jnp.where(jnp.isnan(x), ~jnp.zeros([], word), keys)


def _kth(keys: UInt[Array, "..."], k: Int[Array, "..."], axis: int | None, bits: int) -> tuple[Array, Array]:
    """A number with exactly k keys below it, or else the largest with fewer; and how many are below it."""
    count_in = jnp.int16 if (keys.size if axis is None else keys.shape[axis]) < 2**15 else jnp.int32

    def goes_on(carry: tuple[Array, Array, Array]) -> Array:
        bit, _, below = carry
        return (bit > 0) & jnp.any(below < k)

    def refine(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bit, v, below = carry
        larger = v | (jnp.ones([], keys.dtype) << (bit - 1).astype(keys.dtype))
        smaller_keys = jnp.sum(keys < larger, axis, count_in, keepdims=True).astype(jnp.int32)
        fits = smaller_keys <= k
        return bit - 1, jnp.where(fits, larger, v), jnp.where(fits, smaller_keys, below)

    v = jnp.zeros_like(jnp.min(keys, axis, keepdims=True))
    _, v, below = jax.lax.while_loop(goes_on, refine, (jnp.asarray(bits, jnp.int32), v, v.astype(jnp.int32)))
    return v, below


def global_masks(scores: PyTree, sparsity: Sparsity) -> PyTree:
    """Masks for a tree of scores (None where nothing is pruned), k counted over all of them together.

    Ties go to the earlier leaf, in the order of `jax.tree.leaves`.

    Raises:
      TypeError, ValueError: for a sparsity that is no share.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> masks = fo.compression.global_masks({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}, 0.5)
      >>> print(masks["a"], masks["b"])
      [False False] [ True  True]
    """
    share = as_sparsity(sparsity)
    if isinstance(share, Pattern):
        raise ValueError(f"a pattern is by output, not over all layers: give a share, not {sparsity!r}.")
    leaves, structure = jax.tree.flatten(scores)
    if not leaves:
        return scores
    flat = jnp.concatenate([jnp.ravel(x) for x in leaves])
    stays = keep_largest(flat, count(share, flat.size))
    ends = np.cumsum([x.size for x in leaves])[:-1]
    return structure.unflatten([part.reshape(x.shape) for part, x in zip(jnp.split(stays, ends), leaves, strict=True)])
