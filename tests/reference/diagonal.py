"""Squares of single examples' gradients, one after the other, and Student intervals of weighted means: plain NumPy."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import scipy.stats


def token_gradients(token_losses: Callable[[Any], Any], params: np.ndarray) -> np.ndarray:
    """Row t: the gradient of token t's loss."""
    return np.asarray(jax.jacrev(token_losses)(params), np.float64)


def of_sequence(g: np.ndarray, w: np.ndarray) -> np.ndarray:
    """``(Σ_t √w_t g_t)² / Σ w``."""
    return np.square(np.sqrt(w) @ g) / w.sum()


def of_tokens(g: np.ndarray, w: np.ndarray) -> np.ndarray:
    """``Σ_t w_t g_t² / Σ w``."""
    return w @ np.square(g) / w.sum()


def weighted(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, variance and effective number of rows x with weights w, by two passes."""
    W = w.sum()
    mean = w @ x / W
    return mean, w @ np.square(x - mean) / (W - np.square(w).sum() / W), W**2 / np.square(w).sum()


def interval(x: np.ndarray, w: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Student's, its lower end clipped at 0."""
    mean, variance, n = weighted(x, w)
    half = scipy.stats.t.ppf((1 + level) / 2, n - 1) * np.sqrt(variance / n)
    return np.maximum(mean - half, 0), mean + half
