"""The Fisher of distributions over finitely many outcomes, from their tables of probabilities, in NumPy.

A table takes θ, real or complex, to the probability of each outcome.
"""

from collections.abc import Callable

import numpy as np

Table = Callable[[np.ndarray], np.ndarray]
STEP = 1e-30


def slopes(p: Table, θ: np.ndarray) -> np.ndarray:
    """``∂p(x)/∂θ``, one row an outcome, by complex steps: exact to rounding."""
    return np.stack([np.imag(p(θ + 1j * STEP * e)) / STEP for e in np.eye(len(θ))], -1)


def information(p: Table, θ: np.ndarray) -> np.ndarray:
    """``Σ_x ∂p(x) ∂p(x)ᵀ / p(x)``, which is E[s sᵀ]."""
    return slopes(p, θ).T @ (slopes(p, θ) / p(θ)[:, None])


def merged(p: Table, t: np.ndarray) -> Table:
    """The table of a statistic that is ``t[x]`` for outcome x."""
    return lambda θ: np.stack([p(θ)[t == value].sum() for value in np.unique(t)])


def draws(p: Table, xs: np.ndarray) -> Table:
    """The table of independent draws, for the outcomes ``xs``: one row each, of one number a draw."""
    return lambda θ: p(θ)[xs].prod(-1)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """``Σ p log(p / q)``, in nats."""
    return float(np.sum(p * np.log(p / q)))
