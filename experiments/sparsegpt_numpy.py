"""SparseGPT in NumPy, with the authors' structure: a loop over inputs in blocks, all outputs at once, and one matrix
product a block.
"""

import numpy as np
import scipy.linalg

BLOCK, DAMPING = 128, 0.01


def problem(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the second moment of 4 correlated examples an input."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((4 * inputs, inputs)) @ (
        rng.standard_normal((inputs, inputs)) / inputs**0.5 + 0.3 * np.eye(inputs)
    )
    return rng.standard_normal((inputs, outputs)).astype(np.float32), (X.T @ X / len(X)).astype(np.float32)


def in_numpy(W: np.ndarray, H: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT, the mask of each output chosen by block."""
    W, stays, m = W.copy(), np.ones(W.shape, bool), len(W)
    H_d = H + np.float32(DAMPING * np.trace(H) / m) * np.eye(m, dtype=H.dtype)
    L_inverse = scipy.linalg.solve_triangular(np.linalg.cholesky(H_d[::-1, ::-1]), np.eye(m, dtype=H.dtype), lower=True)
    U = np.ascontiguousarray(L_inverse[::-1, ::-1])
    for i1 in range(0, m, BLOCK):
        i2 = min(i1 + BLOCK, m)
        w, u, E = W[i1:i2], U[i1:i2, i1:i2], np.zeros((i2 - i1, W.shape[1]), W.dtype)
        k = int(np.ceil(share * i2) - np.ceil(share * i1))
        order = np.argpartition(w**2 / np.diag(u)[:, None] ** 2, k - 1, axis=0)
        np.put_along_axis(stays[i1:i2], order[:k], False, 0)
        for i in range(i2 - i1):
            E[i] = np.where(stays[i1 + i], 0, w[i] / u[i, i])
            w[i:] -= u[i, i:, None] * E[i]
        W[i2:] -= U[i1:i2, i2:].T @ E
    return np.where(stays, W, 0), stays
