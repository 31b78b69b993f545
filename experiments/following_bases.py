"""Bases that follow drifting factors, by a step of orthogonal iteration each: how far off they are.

Factors are the means at .95 of ``G Gᵀ``, one G a step, of a covariance with a geometric spectrum whose eigenvectors
turn; G has more columns than rows, or a few, and then the factor has a condition far above the covariance's. A basis
starts at the identity. The error is the off-diagonal mass of ``D^-½ Qᵀ L Q D^-½``, D its diagonal, by the root of the
side, the mean of the last steps: small eigenvalues count as much as large ones.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from fisher_optax import linalg

DECAY, STEPS, LAST, TURN = 0.95, 120, 20, 0.01  # radians a step, of the plane that turns the most
METHODS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "qr": functools.partial(linalg.orthogonal_iteration, method="qr"),
    "cholesky": functools.partial(linalg.orthogonal_iteration, method="cholesky"),
    "eigh": lambda A, Q: linalg.eigenbasis(A),
}


def drifting(side: int, condition: float, rank: int | None, seed: int) -> np.ndarray:
    """The factors of all steps."""
    rng, columns = np.random.default_rng(seed), rank or 2 * side
    V = np.linalg.qr(rng.standard_normal((side, side)))[0]
    turn = rng.standard_normal((side, side))
    turn = scipy.linalg.expm(TURN * (turn - turn.T) / np.linalg.norm(turn - turn.T, 2))
    L, factors = np.zeros((side, side)), []
    for _ in range(STEPS):
        G = (V * np.geomspace(1, condition**-0.5, side)) @ rng.standard_normal((side, columns))
        L = DECAY * L + (1 - DECAY) * G @ G.T / columns
        V = turn @ V
        factors.append(L.astype(np.float32))
    return np.stack(factors)


@functools.cache
def follower(name: str) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """The bases of all steps, and which of these gave none and left the one before."""

    def step(Q: jax.Array, L: jax.Array) -> Any:
        basis, failed = linalg.keep_last_good(METHODS[name](L, Q), Q)
        return basis, (basis, failed)

    return jax.jit(lambda Ls: jax.lax.scan(step, jnp.eye(Ls.shape[-1]), Ls)[1])


def off_diagonal(L: np.ndarray, Q: np.ndarray) -> float:
    B = Q.T @ L @ Q
    scale = np.sqrt(np.maximum(np.diag(B), np.finfo(float).tiny))
    B /= np.outer(scale, scale)
    return float(np.linalg.norm(B - np.diag(np.diag(B))) / len(B) ** 0.5)


def followed(name: str, Ls: np.ndarray) -> tuple[float, int]:
    """The error, and how many steps failed."""
    bases, failed = map(np.asarray, follower(name)(jnp.asarray(Ls)))
    last = zip(Ls[-LAST:].astype(float), bases[-LAST:].astype(float), strict=True)
    return float(np.mean([off_diagonal(L, Q) for L, Q in last])), int(failed.sum())
