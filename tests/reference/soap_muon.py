"""SOAP-Muon (modded-nanogpt's records 44 to 46, without the gate) for one matrix ``in x out`` in float64 NumPy."""

import numpy as np

from tests.reference.soap import eigenbasis, orthogonal_iteration


def polar(X):
    U, _, V = np.linalg.svd(X, full_matrices=False)
    return U @ V


def directions(Gs, b1=0.95, b2=0.9, beta=0.9, eps=1e-8):
    """What is stepped along, for each gradient: ``W ← W - lr direction``."""
    m = v = L = R = 0
    Q = None
    for G in Gs:
        m = b1 * m + (1 - b1) * G
        u = b1 * m + (1 - b1) * G
        if Q is None:
            X = u
        else:
            H = Q[0].T @ u @ Q[1]
            v = b2 * v + (1 - b2) * H**2
            X = Q[0] @ (H / np.maximum(np.sqrt(v), eps)) @ Q[1].T
        yield polar(X)
        L, R = beta * L + (1 - beta) * G @ G.T, beta * R + (1 - beta) * G.T @ G
        if Q is None:
            Q = [eigenbasis(L), eigenbasis(R)]
            continue
        for axis, A in enumerate((L, R)):
            Q[axis], order = orthogonal_iteration(A, Q[axis])
            v = v.take(order, axis) if np.ndim(v) else v
