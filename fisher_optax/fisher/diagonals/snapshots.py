"""A `DiagonalFisher` on the host, whole or in half the memory.

Importances range over many decades, and float16 would flush all below 6e-8 to zero. So each row has a scale of its own,
a power of two that takes its largest entry to [2¹⁴, 2¹⁵): what is a millionth of a row's largest keeps 11 bits, and
scaling itself rounds nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .diagonal_fisher import DiagonalFisher

TOP = 15  # float16 ends at 65,504, just below 2¹⁶


class Halves(NamedTuple):
    """An array in float16, ``values * 2 ** exponents`` by row (the last axis)."""

    values: np.ndarray
    exponents: np.ndarray


def to_host(fisher: DiagonalFisher, half: bool = False) -> DiagonalFisher:
    """The same in NumPy arrays, off the device; with ``half``, mean and m2 as `Halves`, which `to_device` undoes.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> fisher = fo.fisher.DiagonalFisher.zeros(jnp.zeros(2)).update(jnp.array([[1e-20, 3e-15]]), jnp.ones(1))
      >>> stored = fo.fisher.to_host(fisher, half=True)
      >>> print(stored.mean.values.dtype, f"{fo.fisher.to_device(stored).mean[1]:.3g}")
      float16 3e-15
    """
    host = jax.device_get(fisher)
    return host._replace(mean=jax.tree.map(_halved, host.mean), m2=jax.tree.map(_halved, host.m2)) if half else host


def to_device(fisher: DiagonalFisher) -> DiagonalFisher:
    """The inverse of `to_host`, on the default device."""
    packed = lambda x: isinstance(x, Halves)  # noqa: E731
    whole = lambda x: jnp.asarray(np.ldexp(x.values.astype(np.float32), x.exponents) if packed(x) else x)  # noqa: E731
    return jax.tree.map(whole, fisher, is_leaf=packed)


def _halved(x: ArrayLike) -> Halves:
    x = np.asarray(x, np.float32)
    top = np.max(np.abs(x), axis=-1, keepdims=True, initial=0) if x.ndim else np.abs(x)
    exponents = np.frexp(top)[1].astype(np.int16) - np.int16(TOP)
    return Halves(np.ldexp(x, -exponents).astype(np.float16), exponents)
