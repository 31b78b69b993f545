"""Pruning by scores, and by blocks of the Fisher, by definition: float64 NumPy and loops, nothing of the package.

Kernels are (inputs, outputs); a mask is True where a weight stays.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np


def keep(scores: np.ndarray, k: int) -> np.ndarray:
    """False for the k smallest, ordered by (score, index)."""
    flat = np.asarray(scores).ravel()
    stays = np.ones(flat.shape, bool)
    stays[np.lexsort((np.arange(flat.size), flat))[:k]] = False
    return stays.reshape(np.shape(scores))


def count(sparsity: float, n: int) -> int:
    """``⌈s n⌉`` of the decimal number that was written."""
    return math.ceil(Fraction(str(sparsity)) * n)


def mask(scores: np.ndarray, sparsity: Any, scope: str = "matrix") -> np.ndarray:
    """``sparsity`` is a share, or (N, M) to keep N of each M inputs; leading axes are matrices of their own."""
    if scores.ndim > 2:
        return np.stack([mask(s, sparsity, scope) for s in scores])
    if isinstance(sparsity, tuple):
        N, M = sparsity
        stays = np.ones(scores.shape, bool)
        for j in range(scores.shape[1]):
            for i in range(0, scores.shape[0], M):
                stays[i : i + M, j] = keep(scores[i : i + M, j], M - N)
        return stays
    if scope == "matrix":
        return keep(scores, count(sparsity, scores.size))
    return np.stack([keep(column, count(sparsity, len(column))) for column in scores.T], 1)


def block_fisher(grads: np.ndarray, block: int) -> list[np.ndarray]:
    """The mean of g gᵀ for each run of weights in the order (outputs, inputs); the last run may be short."""
    G = np.stack([np.asarray(g, np.float64).T.ravel() for g in grads])
    return [G[:, i : i + block].T @ G[:, i : i + block] / len(G) for i in range(0, G.shape[1], block)]


def recursion(G: np.ndarray, λ: float, dtype: Any = np.float64) -> np.ndarray:
    """``(λ I + (1/m) Σ g gᵀ)⁻¹`` by a rank-one correction for each row g, in the precision given."""
    G, m = np.asarray(G, dtype), dtype(len(G))
    inverse = np.eye(G.shape[1], dtype=dtype) / dtype(λ)
    for g in G:
        v = inverse @ g
        inverse = inverse - np.outer(v, v) / (m + g @ v)
    return inverse


def dense(blocks: list[np.ndarray], λ: float) -> np.ndarray:
    """The block-diagonal Fisher of the flat kernel, λ times its mean diagonal added."""
    n = sum(map(len, blocks))
    F = np.zeros((n, n))
    i = 0
    for block in blocks:
        F[i : i + len(block), i : i + len(block)] = block
        i += len(block)
    return F + λ * np.trace(F) / n * np.eye(n)


def scores(W: np.ndarray, F: np.ndarray) -> np.ndarray:
    """``w_j² / (2 [F⁻¹]_jj)`` for a dense F of the flat kernel (outputs, inputs)."""
    w = np.asarray(W, np.float64).T.ravel()
    return (w**2 / (2 * np.diag(np.linalg.inv(F)))).reshape(W.T.shape).T


def single_updates(W: np.ndarray, F: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """The sum of the optimal updates for the removal of each weight alone, then what goes set to 0."""
    w, inverse = np.asarray(W, np.float64).T.ravel(), np.linalg.inv(F)
    new = w.copy()
    for j in np.flatnonzero(~stays.T.ravel()):
        new -= inverse[:, j] * w[j] / inverse[j, j]
    return np.where(stays, new.reshape(W.T.shape).T, 0)


def joint_minimum(W: np.ndarray, F: np.ndarray, stays: np.ndarray) -> np.ndarray:
    """The minimum of ``½ ΔᵀFΔ`` over what stays, by least squares in a root of F."""
    w, S = np.asarray(W, np.float64).T.ravel(), stays.T.ravel()
    R = np.linalg.cholesky(F).T
    new = np.zeros_like(w)
    new[S] = np.linalg.lstsq(R[:, S], R @ w, rcond=None)[0]
    return new.reshape(W.T.shape).T


def rise(W: np.ndarray, new: Any, F: np.ndarray) -> float:
    """``½ ΔᵀFΔ``."""
    Δ = (np.asarray(new, np.float64) - W).T.ravel()
    return float(Δ @ F @ Δ / 2)
