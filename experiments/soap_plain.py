"""SOAP as its authors write it, leaf by leaf: the yardstick of `fo.soap`.

The first call only starts the bases, the eigenvectors of ``L = (1 - β) G Gᵀ`` and ``R = (1 - β) Gᵀ G``. Later ones take
Adam's step on ``Q_Lᵀ G Q_R``, with the momentum of G itself turned into the basis at every step; every ``every`` steps
each basis takes a step of orthogonal iteration by Householder QR, sorted by its Rayleigh quotients.

Source: Vyas et al. 2024 (arXiv 2409.11321), Algorithm 3, in the order of the authors' code.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import Precision
from jaxtyping import Array, Float, Int

product = functools.partial(functools.reduce, functools.partial(jnp.matmul, precision=Precision.HIGHEST))


class Leaf(NamedTuple):
    """What is kept of one matrix."""

    m: Float[Array, "m n"]  # momentum, not turned
    v: Float[Array, "m n"]  # second moment, in the bases
    L: Float[Array, "m m"]
    R: Float[Array, "n n"]
    QL: Float[Array, "m m"]
    QR: Float[Array, "n n"]


def start(leaf: Leaf) -> Leaf:
    QL, QR = (jnp.linalg.eigh(A)[1][:, ::-1] for A in (leaf.L, leaf.R))
    return leaf._replace(QL=QL, QR=QR)


def refresh(leaf: Leaf) -> Leaf:
    def iterate(A: Array, Q: Array) -> tuple[Array, Array]:
        order = jnp.argsort(-jnp.diag(product((Q.T, A, Q))))
        return jnp.linalg.qr(product((A, Q[:, order])))[0], order

    (QL, rows), (QR, columns) = iterate(leaf.L, leaf.QL), iterate(leaf.R, leaf.QR)
    return leaf._replace(v=leaf.v[rows][:, columns], QL=QL, QR=QR)


def scale_by_soap_plain(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, every: int = 10
) -> optax.GradientTransformation:
    """The direction for a tree of matrices."""

    def init(params: Any) -> tuple[Array, list[Leaf]]:
        zeros = [(W.shape, W.shape, *[(d, d) for d in W.shape] * 2) for W in jax.tree.leaves(params)]
        return jnp.int32(0), [Leaf(*map(jnp.zeros, shapes)) for shapes in zeros]

    def step(G: Array, leaf: Leaf, t: Int[Array, ""]) -> tuple[Array, Leaf]:
        m = jnp.where(t > 0, b1 * leaf.m + (1 - b1) * G, 0)
        g, M = (product((leaf.QL.T, X, leaf.QR)) for X in (G, m))
        v = jnp.where(t > 0, b2 * leaf.v + (1 - b2) * g**2, 0)
        bias = jnp.sqrt(1 - b2**t) / jnp.where(t > 0, 1 - b1**t, 1)
        U = bias * product((leaf.QL, M / (jnp.sqrt(v) + eps), leaf.QR.T))
        L, R = (b2 * A + (1 - b2) * product(pair) for A, pair in ((leaf.L, (G, G.T)), (leaf.R, (G.T, G))))
        kept = Leaf(m, v, L, R, leaf.QL, leaf.QR)
        which = jnp.where(t == 0, 0, jnp.where(t % every == 0, 1, 2))
        return U, jax.lax.switch(which, [start, refresh, lambda leaf: leaf], kept)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        (t, before), (flat, treedef) = state, jax.tree.flatten(updates)
        after = [step(G.astype(leaf.m.dtype), leaf, t) for G, leaf in zip(flat, before, strict=True)]
        turned = [U.astype(G.dtype) for (U, _), G in zip(after, flat, strict=True)]
        return treedef.unflatten(turned), (t + 1, [leaf for _, leaf in after])

    return optax.GradientTransformation(init, update)
