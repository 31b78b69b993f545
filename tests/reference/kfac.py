"""K-FAC and EKFAC for one layer in float64 NumPy, by dense matrices of size mn x mn.

Martens and Grosse 2015 (arXiv 1503.05671), George et al. 2018 (arXiv 1806.03884). ``W`` is ``in x out`` with the bias
as its last row; ``vec`` is row-major, so that ``A ⊗ B`` acts on ``vec(G)`` as ``A G B``.
"""

import numpy as np


def power(A, p):
    """A symmetric matrix to the power p."""
    values, vectors = np.linalg.eigh(A)
    return (vectors * values**p) @ vectors.T


def eigenbasis(A):
    """Eigenvectors, largest eigenvalue first."""
    return np.linalg.eigh(A)[1][:, ::-1]


class Kfac:
    """``step(G, A, B, squares)`` updates and returns ``W``; ``squares(Q_A, Q_B)`` for EKFAC; no A: no statistics."""

    def __init__(
        self,
        W,
        learning_rate,
        momentum=0.9,
        curvature_decay=0.95,
        damping=1e-3,
        weight_decay=0.0,
        *,
        exponent=-1.0,
        factored=False,
        corrected=False,
        grafting=False,
        kl_clip=None,
        precondition_frequency=10,
    ):
        self.W, self.velocity = np.array(W, np.float64), np.zeros_like(W)
        self.lr, self.mu, self.beta, self.damping = learning_rate, momentum, curvature_decay, damping
        self.wd, self.p, self.factored, self.corrected = weight_decay, exponent, factored, corrected
        self.grafting, self.clip, self.every = grafting, kl_clip, precondition_frequency
        m, n = self.W.shape
        self.A, self.B, self.weight = np.zeros((m, m)), np.zeros((n, n)), 0.0
        self.S, self.S_weight, self.Q = np.zeros((m, n)), 0.0, (np.eye(m), np.eye(n))
        self.calls = 0

    def step(self, G, A=None, B=None, squares=None):
        self.calls += 1
        first = A is not None and self.weight == 0
        if A is not None:
            self._follow(A, B, squares)
        if self.calls == 1 or first or self.calls % self.every == 0:
            self._refresh()
        D = self._direction(G) if self.weight else np.zeros_like(G)
        if self.grafting:
            D *= np.linalg.norm(G) / np.linalg.norm(D)
        if self.clip is not None:
            D *= min(1, np.sqrt(self.clip / (self.lr**2 * np.sum(D * G))))
        self.velocity = self.mu * self.velocity + D
        self.W -= self.lr * (self.velocity + self.wd * self.W)
        return self.W.copy()

    def _follow(self, A, B, squares):
        self.A = self.beta * self.A + (1 - self.beta) * A
        self.B = self.beta * self.B + (1 - self.beta) * B
        self.weight = self.beta * self.weight + 1 - self.beta
        if squares is not None and self.calls > 1:
            self.S = self.beta * self.S + (1 - self.beta) * squares(*self.Q)
            self.S_weight = self.beta * self.S_weight + 1 - self.beta

    def _refresh(self):
        self.used = [self.A / (self.weight or 1), self.B / (self.weight or 1)]
        if self.corrected:
            new = [eigenbasis(X) for X in self.used]
            C_A, C_B = (Q.T @ old for Q, old in zip(new, self.Q, strict=True))
            self.S, self.Q = C_A**2 @ self.S @ (C_B**2).T, new

    def _direction(self, G):
        A, B = self.used
        if self.factored:
            pi = np.sqrt(np.trace(A) / len(A) / (np.trace(B) / len(B)))
            A = A + pi * np.sqrt(self.damping) * np.eye(len(A))
            B = B + np.sqrt(self.damping) / pi * np.eye(len(B))
            return power(A, self.p) @ G @ power(B, self.p)
        if not self.corrected:
            F = np.kron(A, B)
        else:
            Q = np.kron(*self.Q)
            diagonal = self.S.ravel() / self.S_weight if self.S_weight else np.diag(Q.T @ np.kron(A, B) @ Q)
            F = (Q * diagonal) @ Q.T
        return (power(F + self.damping * np.eye(len(F)), self.p) @ G.ravel()).reshape(G.shape)
