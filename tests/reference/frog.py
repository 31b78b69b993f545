"""FROG and K-FROG for one layer's matrix ``in x out`` in float64 NumPy: the Fisher of every row formed and solved by
itself.

``X`` has a row for each dense position or each patch of each example, ``Y`` the gradient at its outputs; what the
author calls a row, the weights of one output, is a column here.
"""

import itertools

import numpy as np


def patches(inputs, window_shape, strides, padding, rhs_dilation):
    """The inputs under the window at each place: ``(examples * places, window * channels)``."""
    x = np.pad(inputs, [(0, 0), *padding, (0, 0)])
    places = [
        range(0, size - (extent - 1) * dilation, stride)
        for size, extent, dilation, stride in zip(x.shape[1:-1], window_shape, rhs_dilation, strides, strict=True)
    ]
    cut = [
        np.stack(
            [
                x[(slice(None), *(p + o * d for p, o, d in zip(place, offset, rhs_dilation, strict=True)))]
                for offset in itertools.product(*map(range, window_shape))
            ],
            axis=1,
        )
        for place in itertools.product(*places)
    ]
    return np.stack(cut, axis=1).reshape(len(x) * len(cut), -1)


def conjugate_gradient(A, b, iterations, guard=0.0):
    """So many steps on ``A z = b`` from 0, ``guard`` added to both denominators; None: the solution."""
    if iterations is None:
        return np.linalg.solve(A, b)
    z, r = np.zeros_like(b), b.copy()
    p = r.copy()
    for _ in range(iterations):
        alpha = (r @ r) / (p @ A @ p + guard)
        z, new = z + alpha * p, r - alpha * (A @ p)
        p, r = new + (new @ new) / (r @ r + guard) * p, new
    return z


def frog_row(M, X, Y, damping, iterations, guard=0.0):
    """The direction of the weights of one output: M ``(D,)``, X ``(rows, D)``, Y ``(rows,)``."""
    r, D = X.shape
    trace = sum(y**2 * (x @ x) for x, y in zip(X, Y, strict=True)) / (r * D)
    weights = (Y**2 / r) / trace
    z = conjugate_gradient(X.T @ np.diag(weights) @ X + damping * np.eye(D), M, iterations, guard)
    return z / np.sqrt(z @ M)


def kfrog_row(M, X, Y, damping, iterations, guard=0.0):
    """As `frog_row`."""
    A = X.T @ X / len(X)
    z = conjugate_gradient(A + damping * np.eye(len(A)), M / np.sqrt(np.mean(Y**2)), iterations, guard)
    return np.sqrt(np.diag(A)) * z


class Frog:
    """``step(G, X, Y)`` updates and returns ``W``."""

    def __init__(
        self, W, learning_rate, momentum=0.9, damping=1e-4, iterations=4, weight_decay=0.0, *, row=frog_row, guard=0.0
    ):
        self.W = np.array(W, np.float64)
        self.lr, self.momentum, self.wd, self.row = learning_rate, momentum, weight_decay, row
        self.damping, self.iterations, self.guard = damping, iterations, guard
        self.M = np.zeros_like(self.W)

    def step(self, G, X, Y):
        self.M = self.momentum * self.M + G
        rows = [
            self.row(m, X, y, self.damping, self.iterations, guard=self.guard)
            for m, y in zip(self.M.T, Y.T, strict=True)
        ]
        self.W = (1 - self.wd * self.lr) * self.W - self.lr * np.stack(rows, axis=1)
        return self.W.copy()
