"""Muon (Jordan et al. 2024) for one matrix ``in x out`` in float64 NumPy."""

import numpy as np

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
YOU = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
# Amsel et al. 2025 (arXiv 2505.16932): the first two quintics as published, made safe for values slightly above 1.
POLAR_EXPRESS_START = [
    (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5),
    (4.107059111542203 / 1.01, -2.9478499167379106 / 1.01**3, 0.5448431082926601 / 1.01**5),
]


def polar(G, polynomial):
    """The odd polynomials ``a x + b x³ + c x⁵``, one after the other, on the singular values of ``G / |G|``."""
    norm = np.linalg.norm(G)
    X = G / norm if norm > 0 else G
    for a, b, c in polynomial:
        XXt = X @ X.T
        X = a * X + (b * XXt + c * XXt @ XXt) @ X
    return X


def scale_of(scale, inputs, outputs):
    """What multiplies the orthogonal matrix: Moonlight's, Jordan's, or the spectral condition's factor, or a number."""
    rules = {
        "match_rms_adamw": 0.2 * np.sqrt(max(inputs, outputs)),
        "shape": np.sqrt(max(1, outputs / inputs)),
        "unit_rms": np.sqrt(outputs / inputs),
    }
    return rules[scale] if isinstance(scale, str) else scale


class Muon:
    """``step(G)`` updates and returns ``W``."""

    def __init__(
        self,
        W,
        learning_rate,
        beta=0.95,
        nesterov=True,
        weight_decay=0.0,
        *,
        scale="match_rms_adamw",
        polynomial=JORDAN,
    ):
        self.W = np.array(W, np.float64)
        self.lr, self.beta, self.nesterov, self.wd = learning_rate, beta, nesterov, weight_decay
        self.scale, self.polynomial = scale_of(scale, *self.W.shape), polynomial
        self.m = np.zeros_like(self.W)

    def step(self, G):
        self.m = self.beta * self.m + G
        u = self.beta * self.m + G if self.nesterov else self.m
        direction = self.scale * polar(u, self.polynomial)
        self.W = self.W - self.lr * (direction + self.wd * self.W)
        return self.W.copy()
