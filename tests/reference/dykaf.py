"""DyKAF (Yudin et al. 2025, arXiv 2511.06477) in float64 NumPy: the steps as written, and the integrator they are."""

import numpy as np


def unit(X):
    return X / np.linalg.norm(X)


def sequential(L, R, G, beta):
    s0, L_, R_ = beta * np.linalg.norm(L) * np.linalg.norm(R), unit(L), unit(R)
    K = s0 * L_ + (1 - beta) * G @ R_ @ G.T
    U = unit(K)
    H = s0 * np.sum(U * L_) * R_ + (1 - beta) * G.T @ U @ G
    s = np.linalg.norm(H)
    return np.sqrt(s) * U, H / np.sqrt(s)


def rearranged(F, m, n):
    """Van Loan and Pitsianis: ``L kron R`` becomes ``vec(L) vec(R)'``."""
    return F.reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n)


def lubich_oseledets(u, s, v, change):
    """One rank-one projector-splitting step of ``s u v'`` by a dense ``change``: K, S, L steps (2014, section 3.2)."""
    K = s * u + change @ v
    u1, s1 = unit(K), np.linalg.norm(K)
    s2 = s1 - u1 @ change @ v
    l = s2 * v + change.T @ u1
    return u1, np.linalg.norm(l), unit(l)
