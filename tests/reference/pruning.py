"""Pruning in NumPy and float64, from the definitions: nothing of the package.

Reconstruction: the best weights under a mask, the best mask one weight at a time, and SparseGPT column by column. Here
W is (inputs, outputs) and H the mean of x xᵀ; a mask is True where a weight stays.
"""

import math
from typing import Any

import numpy as np


def damped(H: Any, damping: float) -> np.ndarray:
    """``H + damping mean(diag H) I``, with H_jj = 1 where an input was always 0."""
    H = np.array(H, np.float64)
    H[np.diag_indices_from(H)] += np.diag(H) == 0
    return H + damping * np.trace(H) / len(H) * np.eye(len(H))


def loss(W: Any, new: Any, H: Any) -> float:
    """``½ tr(Δᵀ H Δ)``."""
    D = np.asarray(new, np.float64) - np.asarray(W, np.float64)
    return float(np.trace(D.T @ np.asarray(H, np.float64) @ D) / 2)


def refit(W: Any, H: np.ndarray, stays: Any) -> np.ndarray:
    """The least loss under a mask, for each output: its normal equations ``H_RR w_R = (H w₀)_R``."""
    W, stays = np.asarray(W, np.float64), np.asarray(stays)
    new = np.zeros_like(W)
    for o in range(W.shape[1]):
        R = stays[:, o]
        new[R, o] = np.linalg.lstsq(H[np.ix_(R, R)], H[R] @ W[:, o], rcond=None)[0]
    return new


def greedy(W: Any, H: np.ndarray, k: int, pattern: tuple[int, int] | None = None) -> np.ndarray:
    """The mask after k steps, each of which tries every weight of an output with a refit of the rest."""
    W = np.asarray(W, np.float64)
    stays = np.ones(W.shape, bool)
    for o in range(W.shape[1]):
        w = W[:, [o]]
        for _ in range(k):
            losses = np.full(len(W), np.inf)
            for j in np.flatnonzero(stays[:, o]):
                group = slice(j // pattern[1] * pattern[1], (j // pattern[1] + 1) * pattern[1]) if pattern else None
                if pattern and stays[group, o].sum() <= pattern[0]:
                    continue
                without = stays[:, [o]].copy()
                without[j] = False
                losses[j] = loss(w, refit(w, H, without), H)
            stays[np.argmin(losses), o] = False
    return stays


def sparsegpt(
    W: Any,
    H: Any,
    damping: float,
    block: int,
    share: float | None = None,
    pattern: tuple[int, int] | None = None,
    mask: Any = None,
    scope: str = "output",
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and mask, every correction made at once; H⁻¹ explicitly, then its Cholesky factor."""
    H_d = damped(H, damping)
    W = np.where(np.diag(H)[:, None] == 0, 0.0, np.asarray(W, np.float64)).T  # outputs x inputs, as in the paper
    (n, m), U = W.shape, np.linalg.cholesky(np.linalg.inv(H_d)).T
    stays = np.ones(W.shape, bool) if mask is None else np.asarray(mask).T.copy()
    for i in range(m):
        if share is not None and i % block == 0:
            cut = slice(i, min(i + block, m))
            scores, size = W[:, cut] ** 2 / np.diag(U)[cut] ** 2, n if scope == "block" else 1
            k = math.ceil(round(share * cut.stop * size, 9)) - math.ceil(round(share * i * size, 9))
            if scope == "block":
                stays[:, cut] = without_smallest(scores.T.reshape(1, -1), k).reshape(-1, n).T
            else:
                stays[:, cut] = without_smallest(scores, k)
        if pattern and i % pattern[1] == 0:
            cut = slice(i, i + pattern[1])
            stays[:, cut] = without_smallest(W[:, cut] ** 2 / np.diag(U)[cut] ** 2, pattern[1] - pattern[0])
        e = np.where(stays[:, i], 0, W[:, i]) / U[i, i]
        W[:, i:] -= np.outer(e, U[i, i:])
    return np.where(stays, W, 0).T, stays.T


def without_smallest(scores: np.ndarray, k: int) -> np.ndarray:
    """False for the k smallest of each row, of equal ones the first."""
    stays = np.ones(scores.shape, bool)
    np.put_along_axis(stays, np.argsort(scores, 1, kind="stable")[:, :k], False, 1)
    return stays
