"""What each method makes of one layer's block, from its rows G: (r, m, n), in float64 NumPy, as mn x mn entries.

A sum over rows is ``Σ_r vec(G_r) vec(G_r)ᵀ``, vec row-major. Nothing of the package.
"""

from typing import Any

import numpy as np

from tests.reference.dykaf import rearranged, sequential, unit


def block(G: np.ndarray) -> np.ndarray:
    g = G.reshape(len(G), -1)
    return g.T @ g


def diagonal(G: np.ndarray) -> np.ndarray:
    return np.diag(np.diag(block(G)))


def rowwise(G: np.ndarray) -> np.ndarray:
    _, m, n = G.shape
    return block(G) * (np.arange(m * n)[:, None] % n == np.arange(m * n) % n)


def root(A: np.ndarray) -> np.ndarray:
    λ, Q = np.linalg.eigh(A)
    λ[λ < 1e-13 * λ.max()] = 0
    return (Q * np.sqrt(λ)) @ Q.T


def in_basis(F: np.ndarray, A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """F with what is off its diagonal in the eigenbasis of A ⊗ B dropped."""
    Q = np.kron(np.linalg.eigh(A)[1], np.linalg.eigh(B)[1])
    return Q @ np.diag(np.diag(Q.T @ F @ Q)) @ Q.T


def moments(G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return sum(g @ g.T for g in G), sum(g.T @ g for g in G)


def shampoo(G: np.ndarray) -> np.ndarray:
    L, R = moments(G)
    return root(np.kron(L, R))


def shampoo_scaled(G: np.ndarray) -> np.ndarray:
    L, R = moments(G)
    return np.kron(L, R) / np.trace(L)


def soap(G: np.ndarray) -> np.ndarray:
    return in_basis(block(G), *moments(G))


def dykaf(G: np.ndarray, sweeps: int = 1) -> np.ndarray:
    """The running mean of ``√r G_r`` from the first one's largest singular triple."""
    G = np.sqrt(len(G)) * G
    U, s, V = np.linalg.svd(G[0])
    L, R = s[0] * np.outer(U[:, 0], U[:, 0]), s[0] * np.outer(V[0], V[0])
    for t, g in enumerate(np.tile(G, (sweeps, 1, 1)), 1):
        L, R = sequential(L, R, g, (t - 1) / t)
    return np.kron(L, R)


def kl(G: np.ndarray, ridge: float) -> np.ndarray:
    """A thousand alternations from the entries of F + ε I."""
    _, m, n = G.shape
    F = block(G)
    F = (F + ridge * np.trace(F) / len(F) * np.eye(len(F))).reshape(m, n, m, n)
    R = np.eye(n)
    for _ in range(1000):
        L = np.einsum("ijkl,jl->ik", F, np.linalg.inv(R)) / n
        R = np.einsum("ijkl,ik->jl", F, np.linalg.inv(L)) / m
    return np.kron(L, R)


def nearest(G: np.ndarray) -> np.ndarray:
    _, m, n = G.shape
    U, s, V = np.linalg.svd(rearranged(block(G), m, n))
    return s[0] * np.kron(U[:, 0].reshape(m, m), V[0].reshape(n, n))


def gaussian_kl(A: np.ndarray, B: np.ndarray) -> float:
    """KL(N(0, A) | N(0, B)) by eigenvalues of the pencil."""
    λ = np.linalg.eigvals(np.linalg.solve(B, A)).real
    return float(np.sum(λ - 1 - np.log(λ)) / 2)


def measures(A: Any, B: Any, damping: float) -> tuple[float, float, float, float]:
    """Relative error, cosine, spectral distance and KL, of A against B."""
    A, B = np.asarray(A, np.float64), np.asarray(B, np.float64)
    I = np.eye(len(A))
    return (
        float(np.linalg.norm(A - B) / np.linalg.norm(B)),
        float(np.sum(unit(A) * unit(B))),
        float(np.linalg.norm(A - B, 2) / np.linalg.norm(B, 2)),
        gaussian_kl(A + damping * I, B + damping * I),
    )
