"""AdamW with SOAP's conventions in float64 NumPy: eps before the bias correction, decay after the step."""

import numpy as np


class Adam:
    """``step(G)`` updates and returns ``W``; with ``first_step="skip"`` the first call changes nothing at all."""

    def __init__(self, W, learning_rate=3e-3, b1=0.95, b2=0.95, eps=1e-8, weight_decay=0.01, first_step="skip"):
        self.W = np.array(W, np.float64)
        self.lr, self.b1, self.b2, self.eps, self.wd = learning_rate, b1, b2, eps, weight_decay
        self.m, self.v = np.zeros_like(self.W), np.zeros_like(self.W)
        self.count, self.skip = 0, first_step == "skip"

    def step(self, G):
        if self.skip:
            self.skip = False
            return self.W.copy()
        self.count += 1
        self.m = self.b1 * self.m + (1 - self.b1) * G
        self.v = self.b2 * self.v + (1 - self.b2) * G**2
        rate = self.lr * np.sqrt(1 - self.b2**self.count) / (1 - self.b1**self.count)
        self.W = self.W - rate * self.m / (np.sqrt(self.v) + self.eps)
        self.W = self.W - self.lr * self.wd * self.W
        return self.W.copy()
