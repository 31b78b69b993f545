"""Shampoo (Gupta et al. 2018, arXiv 1802.09568) with averages, grafting, blocks and a start step, in float64 NumPy."""

import numpy as np


def power(A, exponent, ridge):
    values, Q = np.linalg.eigh((A + A.T) / 2)
    values = np.maximum(values, 0)
    return (Q * (values + ridge * values.max()) ** exponent) @ Q.T


def pieces(length, size):
    """Balanced blocks, the longer ones first."""
    count = 1 if size is None else -(-length // size)
    return np.array_split(np.arange(length), count)


class Shampoo:
    """``step(G)`` updates and returns ``W``."""

    def __init__(
        self,
        W,
        learning_rate,
        b1=0.9,
        b2=0.99,
        eps=1e-6,
        weight_decay=0.0,
        *,
        exponent=-0.25,
        grafting="adam",
        accumulate="mean",
        trace_scaling=False,
        block_size=None,
        precondition_frequency=10,
        start_preconditioning_step=None,
        sides="both",
    ):
        self.W = np.array(W, np.float64)
        self.lr, self.b1, self.b2, self.eps, self.wd = learning_rate, b1, b2, eps, weight_decay
        self.p, self.grafting, self.accumulate, self.traced = exponent, grafting, accumulate, trace_scaling
        self.every, self.size, self.sides = precondition_frequency, block_size, sides
        start = start_preconditioning_step
        self.start = precondition_frequency if start is None else start
        self.m, self.mu, self.nu = (np.zeros_like(self.W) for _ in range(3))
        self.factors, self.roots, self.weight, self.t = {}, {}, 0.0, 0

    def step(self, G):
        self.t += 1
        old, new = (1, 1) if self.accumulate == "sum" else (self.b2, 1 - self.b2)
        self.weight = old * self.weight + new
        self.m = self.b1 * self.m + G
        D = np.zeros_like(G)
        for rows in pieces(G.shape[0], self.size):
            for columns in pieces(G.shape[1], self.size):
                block = np.ix_(rows, columns)
                D[block] = self._block((rows[0], columns[0]), G[block], self.m[block], old, new)
        M = self._magnitude(G)
        if self.t < self.start:
            U = self.m if M is None else M
        else:
            U = D if M is None else D * np.linalg.norm(M) / np.linalg.norm(D)
        self.W = self.W - self.lr * (U + self.wd * self.W)
        return self.W.copy()

    def _block(self, key, G, m, old, new):
        L, R = self.factors.get(key, (0, 0))
        self.factors[key] = L, R = old * L + new * G @ G.T, old * R + new * G.T @ G
        if self.t == 1 or self.t % self.every == 0:
            w = 1 if self.accumulate == "sum" else self.weight
            read = [A / w / (np.sqrt(np.trace(A / w)) if self.traced else 1) for A in (L, R)]
            self.roots[key] = [power(A, self.p, self.eps) for A in read]
        left, right = self.roots[key]
        if self.sides == "both":
            return left @ m @ right
        twice = 2 if self.p >= -0.25 else 1
        if G.shape[0] <= G.shape[1]:
            return np.linalg.matrix_power(left, twice) @ m
        return m @ np.linalg.matrix_power(right, twice)

    def _magnitude(self, G):
        if self.grafting == "sgd":
            return G
        self.mu = self.b1 * self.mu + (1 - self.b1) * G
        if self.grafting == "rmsprop":
            self.nu = 0.9 * self.nu + 0.1 * G**2
            return G / np.sqrt(self.nu + 1e-8)
        self.nu = self.b2 * self.nu + (1 - self.b2) * G**2
        mu, nu = self.mu / (1 - self.b1**self.t), self.nu / (1 - self.b2**self.t)
        return mu / (np.sqrt(nu) + 1e-8) if self.grafting == "adam" else None
