"""Newton-Schulz iterations in float64 NumPy: on the matrix, as published, and directly on its singular values."""

import numpy as np

# Amsel et al. 2025 (arXiv 2505.16932): the first quintics for singular values in [1e-3, 1], before the safety factor.
PUBLISHED_POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
]


def scalar(s, polynomial):
    """The composed map of one singular value."""
    for a, b, c in polynomial:
        s = a * s + b * s**3 + c * s**5
    return s


def direct(X, polynomial):
    """``A = X Xᵀ; X ← a X + (b A + c A²) X`` on ``X / |X|`` (zero stays zero); tall matrices transposed."""
    if X.shape[0] > X.shape[1]:
        return direct(X.T, polynomial).T
    X = X / (np.linalg.norm(X) or 1)
    for a, b, c in polynomial:
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X


def on_singular_values(X, polynomial):
    """``U p(S) Vᵀ`` for ``X / |X| = U S Vᵀ``."""
    U, s, Vt = np.linalg.svd(X / (np.linalg.norm(X) or 1), full_matrices=False)
    return U * scalar(s, polynomial) @ Vt


def with_singular_values(s, rows, columns, seed=0):
    """A ``rows x columns`` matrix with these singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((rows, len(s))))[0]
    V = np.linalg.qr(rng.standard_normal((columns, len(s))))[0]
    return U * s @ V.T
