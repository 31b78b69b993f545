"""The Fisher of logits from its definition, in float64 NumPy: labels enumerated, systems solved densely."""

from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve


def softmax(z: Any) -> np.ndarray:
    z = np.asarray(z, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def shares(w: Any) -> np.ndarray:
    return np.asarray(w, np.float64) / np.sum(w, dtype=np.float64)


def fisher(P: np.ndarray, w: Any) -> np.ndarray:
    """``Σ_t s_t Σ_y p_ty g gᵀ`` over all labels y, ``g = p_t - e_y``."""
    G = np.zeros((P.shape[1],) * 2)
    for s, p in zip(shares(w), P, strict=True):
        g = p - np.eye(len(p))
        G += s * np.einsum("y,yi,yj->ij", p, g, g)
    return G


def empirical(P: np.ndarray, labels: Any, w: Any) -> np.ndarray:
    g = P - np.eye(P.shape[1])[np.asarray(labels)]
    return np.einsum("t,ti,tj->ij", shares(w), g, g)


def kernel_diagonal(P: np.ndarray, w: Any, h: np.ndarray) -> np.ndarray:
    """``Σ_t s_t Σ_y p_ty (g_v h_j)²``: second moments of the gradient ``g hᵀ`` of a kernel, over all labels y."""
    F = np.zeros((P.shape[1], h.shape[1]))
    for s, p, h_t in zip(shares(w), P, h, strict=True):
        for y, p_y in enumerate(p):
            F += s * p_y * np.outer(p - np.eye(len(p))[y], h_t) ** 2
    return F


def laplacian(P: np.ndarray, w: Any) -> np.ndarray:
    """The same matrix as `fisher` from its entries beside the diagonal, so that small rows keep their digits."""
    G = -(P.T * shares(w)) @ P
    np.fill_diagonal(G, 0)
    np.fill_diagonal(G, -G.sum(1))
    return G


def solve(G: np.ndarray, Y: np.ndarray, damping: float) -> np.ndarray:
    """``(G + λ)⁻¹ Y`` with ``G 1 = 0``, for what is orthogonal to 1 and for 1; the first is not changed by a multiple
    of ``1 1ᵀ`` in the matrix, which makes that well conditioned.
    """
    y = Y.mean(0)
    raised = G + damping * np.eye(len(G)) + np.trace(G) / len(G) ** 2
    return cho_solve(cho_factor(raised, overwrite_a=True, check_finite=False), Y - y) + y / damping


def condition(P: np.ndarray, w: Any, damping: float) -> float:
    """Of ``I - C A⁻¹ Cᵀ`` with rows ``sqrt(s) (p - p̄)`` of C and ``A = diag(p̄ + λ) - p̄ p̄ᵀ``, A taken apart from 1."""
    s, mean = shares(w), shares(w) @ P
    C, d = np.sqrt(s)[:, None] * (P - mean), mean + damping
    z, κ = C @ (1 / d), np.sum(mean / d)
    σ = np.linalg.eigvalsh(np.eye(len(P)) - (C / d) @ C.T - damping / κ * np.outer(z, z))
    return float(σ[-1] / σ[0])
