"""Norm-controlled updates of one matrix in float64 NumPy; u is the direction, ``W' = W - lr u`` the plain step."""

import numpy as np


def norm(X, axis=None):
    return np.linalg.norm(X, axis=axis)


def relative(W, u):
    """NVIDIA's `RelativeUpdateHook`."""
    return u * norm(W) / norm(u)


def brake(W, u, outward, inward):
    """modded-nanogpt's record 29."""
    c = (u * W).sum() / (W * W).sum()
    return u - (1 - (outward if c < 0 else inward)) * c * W


def floor(W, u, share, axis=None):
    """Records 46 (``axis=0``: a column of ``in x out`` is a neuron) and 9."""
    return u * np.maximum(1, share * norm(W, axis) / norm(u, axis))


def hyperball(W, u, lr, R):
    """Wen et al. 2026."""
    V = W - lr * R * u / norm(u)
    return R * V / norm(V)


def pinned(W, u, lr, decay):
    """The end of record 46."""
    r = norm(W) - lr * (u * W).sum() / norm(W)
    V = W - lr * u
    return V * r / norm(V) * (1 - lr * decay * (u * W > 0))
