"""Merging of models as rows of numbers, from the definitions: float64 NumPy."""

import numpy as np


def diagonal_merge(θ: np.ndarray, F: np.ndarray, c: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """``Σ c F θ / Σ c F``, entry by entry; ``otherwise`` where nothing has any F."""
    out = np.array(otherwise, np.float64)
    for j in range(θ.shape[1]):
        if (total := c @ F[:, j]) > 0:
            out[j] = c @ (F[:, j] * θ[:, j]) / total
    return out


def joint_minimiser(θ: np.ndarray, A: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Of ``Σ c_i ½ (θ - θ_i)ᵀ A_i (θ - θ_i)``, the nearest one to the average of the θ_i."""
    average = c @ θ / c.sum()
    b = np.einsum("i,ijk,ik->j", c, A, θ - average)
    return average + np.linalg.pinv(np.einsum("i,ijk->jk", c, A), rcond=1e-10, hermitian=True) @ b


def ties(vectors: np.ndarray, kept: int) -> np.ndarray:
    """Of each row the ``kept`` largest magnitudes (of equals the later), the sign of their sum, their mean of it."""
    trimmed = np.zeros_like(vectors)
    for row, out in zip(vectors, trimmed, strict=True):
        best = np.argsort(np.abs(row), kind="stable")[len(row) - kept :]
        out[best] = row[best]
    merged = np.zeros(vectors.shape[1])
    for j, column in enumerate(trimmed.T):
        agreeing = column[np.sign(column) * np.sign(column.sum()) > 0]
        merged[j] = agreeing.mean() if len(agreeing) else 0.0
    return merged
