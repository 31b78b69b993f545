"""KL-Shampoo and KL-SOAP (Lin et al. 2025, arXiv 2509.03378) for one matrix in float64 NumPy."""

import numpy as np

from tests.reference.soap import eigenbasis, orthogonal_iteration


class KL:
    """``step(G)`` updates and returns ``W``; the skeleton (first call, order, decay) is SOAP's."""

    def __init__(
        self,
        W,
        name,
        learning_rate,
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        weight_decay=0.01,
        *,
        shampoo_beta=None,
        precondition_frequency=10,
        bias_correction=True,
        init="gradient",
        before_step=False,
    ):
        self.W, self.name = np.array(W, np.float64), name
        self.lr, self.b1, self.b2, self.eps, self.wd = learning_rate, b1, b2, eps, weight_decay
        self.beta = b2 if shampoo_beta is None else shampoo_beta
        self.every, self.correct = precondition_frequency, bias_correction
        self.A = [np.eye(d) for d in self.W.shape]
        self.Q = [np.eye(d) for d in self.W.shape]
        self.values = [np.ones(d) for d in self.W.shape]
        self.m, self.v = np.zeros_like(self.W), np.zeros_like(self.W)
        self.calls = self.count = 0
        self.begun, self.before_step = init == "identity", before_step

    def step(self, G):
        self.calls += 1
        if not self.begun and G.any():
            self.begun, size = True, np.sqrt((G**2).mean())
            self.A, self.values = ([size * x for x in pair] for pair in (self.A, self.values))
        (L, R), (QL, QR), (l, r), b = self.A, self.Q, self.values, self.beta
        m, n = G.shape
        self.A = [
            b * L + (1 - b) / n * G @ QR @ np.diag(1 / r) @ QR.T @ G.T,
            b * R + (1 - b) / m * G.T @ QL @ np.diag(1 / l) @ QL.T @ G,
        ]
        H2 = (QL.T @ G @ QR) ** 2
        self.values = [b * l + (1 - b) * (H2 / r).mean(1), b * r + (1 - b) * (H2.T / l).mean(1)]
        if not self.before_step and self.calls > 1:
            self._move(G)
        if self.calls == 1:
            self._turn([eigenbasis(A) for A in self.A])
        elif (self.count + self.before_step) % self.every == 0:
            new = []
            for axis, (A, Q) in enumerate(zip(self.A, self.Q, strict=True)):
                Q, order = orthogonal_iteration(A, Q)
                self.v = self.v.take(order, axis)
                new.append(Q)
            self._turn(new)
        if self.before_step:
            self._move(G)
        return self.W.copy()

    def _move(self, G):
        (QL, QR), (l, r) = self.Q, self.values
        g = QL.T @ G @ QR
        self.count += 1
        t = self.count
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g**2
        if self.name == "kl_soap":
            u = self.m / (np.sqrt(self.v) + self.eps)
            u *= np.sqrt(1 - self.b2**t) / (1 - self.b1**t) if self.correct else 1
        else:
            u = self.m / (np.sqrt(np.outer(l, r)) + self.eps) / ((1 - self.b1**t) if self.correct else 1)
        self.W -= self.lr * QL @ u @ QR.T
        self.W -= self.lr * self.wd * self.W

    def _turn(self, new):
        CL, CR = (Q.T @ old for Q, old in zip(new, self.Q, strict=True))
        self.m, self.Q = CL @ self.m @ CR.T, new
        self.values = [np.diag(Q.T @ A @ Q) for Q, A in zip(new, self.A, strict=True)]
