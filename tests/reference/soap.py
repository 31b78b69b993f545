"""SOAP (Vyas et al. 2024, arXiv 2409.11321) for one matrix in float64 NumPy, in the order of the authors' code.

The matrix is ``in x out``; ``Q[0]`` turns its rows (inputs), ``Q[1]`` its columns (outputs).
"""

import numpy as np


def eigenbasis(A):
    """Eigenvectors of ``A``, largest eigenvalue first."""
    return np.linalg.eigh(A + 1e-30 * np.eye(len(A)))[1][:, ::-1]


def orthogonal_iteration(A, Q):
    """One step of orthogonal iteration from ``Q`` sorted by its Rayleigh quotients: the new basis and the order."""
    order = np.argsort(-np.diag(Q.T @ A @ Q), kind="stable")
    return np.linalg.qr(A @ Q[:, order])[0], order


def fresh_eigenbasis(A, Q):
    """The eigenvectors of ``A`` and the order that sorts ``Q`` the same way."""
    return eigenbasis(A), np.argsort(-np.diag(Q.T @ A @ Q), kind="stable")


class Soap:
    """``step(G)`` updates and returns ``W``; a side without a factor keeps the identity as its basis.

    ``phase`` shifts the refreshes: they fall on counts equal to ``phase`` modulo ``precondition_frequency``.
    """

    def __init__(
        self,
        W,
        learning_rate=3e-3,
        b1=0.95,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.01,
        *,
        shampoo_beta=None,
        precondition_frequency=10,
        max_precond_dim=10_000,
        bias_correction=True,
        first_step="skip",
        transport="permute",
        sides="both",
        decomposition="qr",
        normalize_updates=False,
        phase=0,
        before_step=False,
    ):
        self.W = np.array(W, np.float64)
        self.lr, self.b1, self.b2, self.eps, self.wd = learning_rate, b1, b2, eps, weight_decay
        self.beta = b2 if shampoo_beta is None else shampoo_beta
        self.every, self.phase, self.bias_correction = precondition_frequency, phase, bias_correction
        self.first_step, self.transport, self.normalize = first_step, transport, normalize_updates
        self.decompose = {"qr": orthogonal_iteration, "eigh": fresh_eigenbasis}[decomposition]
        short = min(self.W.shape)
        self.rotated = [d <= max_precond_dim and (sides == "both" or d == short) for d in self.W.shape]
        self.m, self.v = np.zeros_like(self.W), np.zeros_like(self.W)
        self.Q = [np.eye(d) for d in self.W.shape]
        self.factors = [np.zeros((d, d)) for d in self.W.shape]
        self.calls = self.count = 0
        self.before_step = before_step

    def step(self, G, seen=None):
        """``seen`` are the two sides' second moments, by default those of G."""
        self.calls += 1
        if not self.before_step and (self.calls > 1 or self.first_step == "adam"):
            self._move(G)
        for i, outer in enumerate(seen or (G @ G.T, G.T @ G)):
            self.factors[i] = self.beta * self.factors[i] + (1 - self.beta) * outer
        if self.calls == 1:
            sides = zip(self.factors, self.rotated, strict=True)
            new = [eigenbasis(A) if rotated else np.eye(len(A)) for A, rotated in sides]
            if self.transport == "permute":  # a column continues the axis that has most of it
                for axis, Q in enumerate(new):
                    self.v = self.v.take(np.abs(Q).argmax(0), axis)
            self._turn(new)
        elif (self.count + self.before_step) % self.every == self.phase:
            self._refresh()
        if self.before_step:
            self._move(G)
        return self.W.copy()

    def _move(self, G):
        L, R = self.Q
        g = L.T @ G @ R
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        self.count += 1
        U = L @ (self.m / (np.sqrt(self.v) + self.eps)) @ R.T
        if self.normalize:
            U /= np.sqrt(np.mean(U**2))
        if self.bias_correction:
            U *= np.sqrt(1 - self.b2**self.count) / (1 - self.b1**self.count)
        self.W -= self.lr * U
        self.W -= self.lr * self.wd * self.W

    def _refresh(self):
        new = []
        for axis, (A, Q, rotated) in enumerate(zip(self.factors, self.Q, self.rotated, strict=True)):
            if rotated:
                Q, order = self.decompose(A, Q)
                if self.transport == "permute":
                    self.v = self.v.take(order, axis)
            new.append(Q)
        self._turn(new)

    def _turn(self, new):
        """Carry the moments into the bases ``new``: ``m`` exactly, ``v`` by squared overlaps if asked."""
        CL, CR = (Q.T @ old for Q, old in zip(new, self.Q, strict=True))
        self.m = CL @ self.m @ CR.T
        if self.transport == "squared":
            self.v = CL**2 @ self.v @ (CR**2).T
        self.Q = new
