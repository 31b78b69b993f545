"""Factorisations of batches: on a CPU one matrix at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._xla import by_platform


def one_by_one(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f``, of single matrices, over leading axes and under `jax.vmap`: on a CPU as a loop.

    jaxlib (0.10 to 0.12) runs a batched factorisation in blocks on XLA's thread pool and waits for them on a thread of
    that pool. Two such calls in one program can each hold
    a thread the other waits for, and then the program hangs for ever. A single matrix is factorised where it is
    called, with whatever threads the BLAS has.

    >>> one_by_one(jnp.linalg.cholesky)(4 * jnp.ones((2, 1, 1))).ravel()
    Array([2., 2.], dtype=float32)
    """

    def of_batch(alone: bool, *arrays: Array) -> Any:
        batch = arrays[0].shape[:-2]
        flat = tuple(x.reshape(-1, *x.shape[-2:]) for x in arrays)
        if len(flat[0]) == 1:
            results = jax.tree.map(lambda x: x[None], f(*(x[0] for x in flat)))
        else:
            results = jax.lax.map(lambda xs: f(*xs), flat) if alone else jax.vmap(f)(*flat)
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), results)

    @jax.custom_batching.custom_vmap
    def call(*arrays: Array) -> Any:
        if math.prod(arrays[0].shape[:-2]) == 1:
            return of_batch(False, *arrays)
        return by_platform(of_batch, lambda platform: platform.one_factorisation, *arrays)

    @call.def_vmap
    def batched(size: int, which: list[bool], *arrays: Array) -> tuple[Any, Any]:
        every = (x if there else jnp.broadcast_to(x, (size, *x.shape)) for x, there in zip(arrays, which, strict=True))
        result = call(*every)
        return result, jax.tree.map(lambda _: True, result)

    return call


def sequential(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` of single matrices and whatever else; under `jax.vmap` a loop, so that its conditionals stay what they are.

    >>> jax.vmap(sequential(jnp.linalg.cholesky))(4 * jnp.ones((2, 1, 1))).ravel()
    Array([2., 2.], dtype=float32)
    """
    return jax.custom_batching.sequential_vmap(f)
