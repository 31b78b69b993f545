"""What stands for the Fisher of one layer: forms that multiply a matrix ``V`` without the mn x mn entries, but for one.

    Product     (L ⊗ R) vec V = vec(L V Rᵀ)
    Rotated     (Q_L ⊗ Q_R) diag(S) (Q_L ⊗ Q_R)ᵀ vec V = vec(Q_L [(Q_Lᵀ V Q_R) ∘ S] Q_Rᵀ)
    ByOutput    one m x m block for each of the n outputs
    RowSum      Σ_r vec(G_r) vec(G_r)ᵀ
    Entries     all (mn)² of them

vec is row-major, and a stack of N matrices is N blocks of the Fisher. The last two are exact; to fit a Kronecker
product to one of them two sums are enough, ``Σ G_r Y G_rᵀ`` and ``Σ G_rᵀ X G_r``.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float, PyTree

from ...matrices.layout import Layer, join, split
from .operator import Rule

einsum = functools.partial(jnp.einsum, precision=Precision.HIGHEST)


class Product(NamedTuple):
    """A Kronecker product."""

    left: Float[Array, "N m m"]
    right: Float[Array, "N n n"]

    def product(self, V: Array) -> Array:
        return einsum("aij,ajk,akl->ail", self.left, V, self.right)


class Rotated(NamedTuple):
    """A diagonal in a basis that is a Kronecker product; without bases, in the parameters' own."""

    left: Float[Array, "N m m"] | None
    right: Float[Array, "N n n"] | None
    values: Float[Array, "N m n"]

    def product(self, V: Array) -> Array:
        if self.left is None or self.right is None:
            return self.values * V
        H = self.values * in_bases(V, self.left, self.right)
        return einsum("aij,ajk,alk->ail", self.left, H, self.right)


class ByOutput(NamedTuple):
    """Nothing between the outputs."""

    blocks: Float[Array, "N n m m"]

    def product(self, V: Array) -> Array:
        return einsum("anij,ajn->ain", self.blocks, V)


class RowSum(NamedTuple):
    """Exact, by rows."""

    rows: Float[Array, "N r m n"]

    def product(self, V: Array) -> Array:
        return einsum("ar,armn->amn", einsum("armn,amn->ar", self.rows, V), self.rows)


class Entries(NamedTuple):
    """Exact, by entries."""

    entries: Float[Array, "N m n m n"]

    def product(self, V: Array) -> Array:
        return einsum("aijkl,akl->aij", self.entries, V)


Form = Product | Rotated | ByOutput | RowSum | Entries


class Sums:
    """``left(Y) = Σ G_r Y G_rᵀ`` and ``right(X) = Σ G_rᵀ X G_r`` of one exact block, a stack's slice."""

    def __init__(self, exact: RowSum | Entries) -> None:
        (block,) = exact
        self.rows = block if isinstance(exact, RowSum) else None
        if self.rows is not None:
            self.m, self.n = block.shape[-2:]
            self.mean_diagonal = jnp.sum(jnp.square(block)) / (self.m * self.n)
        else:
            self.m, self.n = block.shape[:2]
            # Van Loan's rearrangement: of L ⊗ R it is vec(L) vec(R)ᵀ.
            self.rearranged = block.transpose(0, 2, 1, 3).reshape(self.m**2, self.n**2)
            self.mean_diagonal = einsum("ijij->", block) / (self.m * self.n)

    def left(self, Y: Float[Array, "n n"]) -> Float[Array, "m m"]:
        if self.rows is not None:
            return einsum("rij,rkj->ik", einsum("rij,jl->ril", self.rows, Y), self.rows)
        return einsum("ab,b->a", self.rearranged, Y.reshape(-1)).reshape(self.m, self.m)

    def right(self, X: Float[Array, "m m"]) -> Float[Array, "n n"]:
        if self.rows is not None:
            return einsum("rij,ril->jl", einsum("rkj,ki->rij", self.rows, X), self.rows)
        return einsum("ab,a->b", self.rearranged, X.reshape(-1)).reshape(self.n, self.n)


def in_bases(V: Array, Q_L: Array, Q_R: Array) -> Array:
    """``Q_Lᵀ V Q_R``."""
    return einsum("aji,...ajk,akl->...ail", Q_L, V, Q_R)


@dataclasses.dataclass(frozen=True)
class LayerForms(Rule):
    """One form a layer, then one for each other leaf, as a column."""

    layers: tuple[Layer, ...]

    def product(self, data: list[Form], v: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(v)
        promoted = [V.astype(jnp.promote_types(V.dtype, jnp.float32)) for V in matrices_of(self.layers, leaves)]
        U = [form.product(V) for form, V in zip(data, promoted, strict=True)]
        shapes = [x.shape for x in join(list(self.layers), leaves)]
        count = len(shapes)
        out = split(list(self.layers), [u.reshape(s) for u, s in zip(U[:count], shapes, strict=True)], leaves)
        for i, u in zip(others_of(self.layers, len(leaves)), U[count:], strict=True):
            out[i] = u.reshape(leaves[i].shape).astype(leaves[i].dtype)
        return jax.tree.unflatten(structure, out)


def matrices_of(layers: tuple[Layer, ...], leaves: list[Array]) -> list[Float[Array, "N m n"]]:
    """A stack of matrices for each layer, and a column for each other leaf."""
    joined = [x.reshape(-1, *x.shape[-2:]) for x in join(list(layers), leaves)]
    return joined + [leaves[i].reshape(1, -1, 1) for i in others_of(layers, len(leaves))]


def others_of(layers: tuple[Layer, ...], count: int) -> list[int]:
    """The places of ``count`` leaves that belong to no layer."""
    used = {i for layer in layers for i in layer.places}
    return [i for i in range(count) if i not in used]
