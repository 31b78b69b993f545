"""Pruning during training, from the papers' equations, in NumPy: nothing of the package.

The optimizer is gradient descent with momentum, ``m ← β m + g, W ← W - lr m``.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def keep(scores: np.ndarray, share: float) -> np.ndarray:
    """All but the ⌈share n⌉ of smallest score."""
    stays = np.ones(scores.size, bool)
    stays[np.argsort(scores.ravel(), kind="stable")[: math.ceil(share * scores.size)]] = False
    return stays.reshape(scores.shape)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def movement(
    W: np.ndarray,
    gradient: Callable[[np.ndarray, int], np.ndarray],
    mask: Callable[[np.ndarray, int], np.ndarray],
    steps: int,
    eta: float,
    penalty: float = 0.0,
    lr: float = 0.1,
    beta: float = 0.9,
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """After each step: W∘M, M and the scores. ``mask(scores, t)`` is the one after step t = 1, 2, ..."""
    W, m, S, M = W.copy(), np.zeros_like(W), np.zeros_like(W), np.ones(W.shape, bool)
    points = []
    for t in range(1, steps + 1):
        g = gradient(W * M, t)
        S = S - eta * (g * W + penalty * sigmoid(S) * (1 - sigmoid(S)))
        m = beta * m + g * M
        W = W - lr * m
        M = mask(S, t)
        points.append((W * M, M, S))
    return points


def gradual(
    W: np.ndarray,
    gradient: Callable[[np.ndarray, int], np.ndarray],
    share: Callable[[int], float],
    steps: int,
    every: int,
    lr: float = 0.1,
    beta: float = 0.9,
) -> list[np.ndarray]:
    """The weights after each step, by magnitude, as long as the share rises."""
    W, m, M, last = W.copy(), np.zeros_like(W), np.ones(W.shape, bool), 0.0
    points: list[Any] = []
    for t in range(1, steps + 1):
        m = beta * m + gradient(W, t) * M
        W = (W - lr * m) * M
        if t % every == 0 and share(t) > last:
            last, M = share(t), M & keep(np.where(M, np.abs(W), -1), share(t))
            W = W * M
        points.append(W)
    return points
