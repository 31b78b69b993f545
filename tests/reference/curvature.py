"""Dense sums for curvature, from per-example gradients, in NumPy and plain JAX: nothing of the package."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def rows(x: Any, width_axes: int = 1) -> np.ndarray:
    """``(*positions, *width)`` as one row a position."""
    x = np.asarray(x, np.float64)
    return x.reshape(int(np.prod(x.shape[: x.ndim - width_axes], dtype=int)), -1)


def factors(a: Any, delta: Any, N: float, bias: bool = False, axes: tuple[int, int] = (1, 1)) -> tuple[Any, Any]:
    """``Σ a aᵀ / P`` and ``N Σ δ δᵀ``, one term a position; inputs and outputs take up the last ``axes``."""
    A, D = rows(a, axes[0]), rows(delta, axes[1])
    A = np.hstack([A, np.ones((len(A), 1))]) if bias else A
    return A.T @ A / len(A), N * D.T @ D


def windows(x: Any, shape: tuple[int, ...], strides: Any, padding: Any, dilation: Any, spread: Any) -> np.ndarray:
    """What each output position of a convolution over ``(N, *spatial, C)`` sees, by loops: ``(N, *out, *window, C)``.

    ``dilation`` is the kernel's; ``spread`` is the input's, which puts zeros between its entries.
    """
    x, n = np.asarray(x, np.float64), len(shape)
    wide = np.zeros((len(x), *((s - 1) * d + 1 for s, d in zip(x.shape[1:-1], spread, strict=True)), x.shape[-1]))
    wide[:, *(slice(None, None, d) for d in spread)] = x
    wide = np.pad(wide, [(0, 0), *padding, (0, 0)])
    reach = [(k - 1) * d + 1 for k, d in zip(shape, dilation, strict=True)]
    out = [(s - r) // t + 1 for s, r, t in zip(wide.shape[1:-1], reach, strides, strict=True)]
    seen = np.zeros((len(x), *out, *shape, x.shape[-1]))
    for place in np.ndindex(*out):
        starts = [p * t for p, t in zip(place, strides, strict=True)]
        cut = [slice(a, a + r, d) for a, r, d in zip(starts, reach, dilation, strict=True)]
        seen[:, *place] = wide[:, *cut]
    assert seen.ndim == 2 + 2 * n
    return seen


def per_example_gradients(losses: Callable[[Any], jax.Array], W: Any) -> np.ndarray:
    """Row i: the gradient of ``losses(W)[i]``, in row-major order."""
    jacobian = jax.jit(jax.jacrev(losses))(W)
    return np.asarray(jacobian, np.float64).reshape(len(jacobian), -1)


def fisher(scores: np.ndarray) -> np.ndarray:
    """``Σ s sᵀ / N`` of N score vectors."""
    return scores.T @ scores / len(scores)


def output_fisher(name: str, z: Any) -> np.ndarray:
    """Of each row of outputs z, by enumerating labels (or in closed form where there are infinitely many)."""
    z = np.asarray(z, np.float64)
    C = z.shape[-1]
    if name == "gaussian":
        return np.broadcast_to(np.eye(C), (len(z), C, C))
    if name == "normal":  # exact for scores, of second degree in the labels
        nodes, weights = np.polynomial.hermite_e.hermegauss(5)
        total = np.zeros((len(z), C, C))
        for k in range(C // 2):
            at = [k, k + C // 2]
            for u, w in zip(nodes, weights / weights.sum(), strict=True):
                score = np.stack([-u * np.exp(-z[:, at[1]] / 2), np.full(len(z), (1 - u * u) / 2)], -1)
                total[:, at[0], at] += w * score[:, :1] * score
                total[:, at[1], at] += w * score[:, 1:] * score
        return total
    if name == "sigmoid_cross_entropy":
        total = np.zeros((len(z), C, C))
        s = 1 / (1 + np.exp(-z))
        for y in np.ndindex(*(2,) * C):
            score = s - np.array(y)
            p = np.prod(np.where(np.array(y) == 1, s, 1 - s), -1)
            total += p[:, None, None] * score[:, :, None] * score[:, None, :]
        return total
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    scores = p[:, None, :] - np.eye(C)  # (N, label, C)
    return np.einsum("ny,nyi,nyj->nij", p, scores, scores)


def gauss_newton(outputs: Callable[[Any], jax.Array], W: Any, H: np.ndarray) -> np.ndarray:
    """``Σ_i J_iᵀ H_i J_i / N`` with J_i the Jacobian of output row i, in row-major order of W."""
    J = np.asarray(jax.jit(jax.jacrev(outputs))(W), np.float64).reshape(*H.shape[:2], -1)
    return np.einsum("nip,nij,njq->pq", J, H, J) / len(H)


def relative(x: Any, y: Any) -> float:
    """``|x - y| / |y|`` in the Frobenius norm."""
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))
