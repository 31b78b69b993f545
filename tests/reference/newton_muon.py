"""Newton-Muon (arXiv 2604.01472) and levanter's sandwich for one matrix ``in x out`` in float64 NumPy."""

import numpy as np

from tests.reference.soap_muon import polar


def damped(A, damping):
    return A + damping * np.trace(A) / len(A) * np.eye(len(A))


def newton(A, G, damping):
    return polar(np.linalg.solve(damped(A, damping), G))


def sandwich(A, G, damping):
    values, Q = np.linalg.eigh(damped(A, damping))
    S = Q / np.sqrt(values) @ Q.T
    D = S @ polar(S @ G)
    return D * np.sqrt(min(D.shape)) / np.linalg.norm(D)


def directions(Gs, As, weights, form, beta=0.95, decay=0.95, damping=0.2, every=1, nesterov=True):
    """What is stepped along, for each gradient with the moment of that many inputs: ``W ← W - lr direction``.

    None stands for a call without statistics. A root is made at the first call, and at each ``every``-th.
    """
    sums = total = m = 0
    K = np.eye(len(Gs[0]))
    for t, (G, A, weight) in enumerate(zip(Gs, As, weights, strict=True), start=1):
        if A is not None:
            sums, total = decay * sums + weight * A, decay * total + weight
        if (t == 1 or t % every == 0) and total:
            K = sums / total
        γ = damping if total else 0.0
        P = np.linalg.solve(damped(K, γ), G) if form == "newton" else G
        m = beta * m + P
        u = beta * m + P if nesterov else m
        yield polar(u) if form == "newton" else sandwich(K, u, γ)
