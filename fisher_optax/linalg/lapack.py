"""LAPACK on a CPU, one matrix at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def one_by_one(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` of matrices, batched over leading axes; on a CPU as a loop over single matrices, under `jax.vmap` too.

    jaxlib (0.10 to 0.12) runs a batched factorisation in blocks on XLA's thread pool and waits for them on a thread of
    that pool. Two such calls in one program can each hold
    a thread the other waits for, and then the program hangs for ever. A single matrix is factorised where it is
    called, with whatever threads the BLAS has.

    >>> import jax.numpy as jnp
    >>> one_by_one(jnp.linalg.cholesky)(4 * jnp.ones((2, 1, 1))).ravel()
    Array([2., 2.], dtype=float32)
    """

    def call(*arrays: Array) -> Any:
        if jax.default_backend() != "cpu":
            return f(*arrays)
        single = sequential(f)
        batch = arrays[0].shape[:-2]
        if math.prod(batch) == 1:
            return _reshaped(single(*(x.reshape(x.shape[-2:]) for x in arrays)), batch)
        return _reshaped(
            jax.lax.map(lambda xs: single(*xs), tuple(x.reshape(-1, *x.shape[-2:]) for x in arrays)), batch, 1
        )

    return call


def sequential(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` of single matrices and whatever else; under `jax.vmap` on a CPU a loop, as by `one_by_one`.

    >>> import jax.numpy as jnp
    >>> jax.vmap(sequential(jnp.linalg.cholesky))(4 * jnp.ones((2, 1, 1))).ravel()
    Array([2., 2.], dtype=float32)
    """
    return jax.custom_batching.sequential_vmap(f) if jax.default_backend() == "cpu" else f


def _reshaped(x: Any, batch: tuple[int, ...], skip: int = 0) -> Any:
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[skip:]), x)
