"""What each method makes of the Fisher, as an operator: diagonal blocks of layers, and simpler ones in their place.

The block of a layer, its kernel with the bias as last row, is ``F = Σ_r vec(G_r) vec(G_r)ᵀ`` over rows of the Fisher:
gradients of single examples and labels, G_r of m x n. With A, B the second moments of inputs and output gradients,
``L = Σ G_r G_rᵀ``, ``R = Σ G_rᵀ G_r``, and Q_X an eigenbasis of X:

    block_diagonal  F
    diagonal        Σ G_r²
    rowwise         Σ g_rj g_rjᵀ for each output j, g_rj column j of G_r          FROG
    kfac            A ⊗ B                                                         Martens and Grosse 2015
    ekfac           Σ (Q_Aᵀ G_r Q_B)² in the basis Q_A ⊗ Q_B                      George et al. 2018
    shampoo         (L ⊗ R)^½, or L ⊗ R / tr L                                    Gupta et al. 2018; Morwani et al. 2024
    soap            Σ (Q_Lᵀ G_r Q_R)² in the basis Q_L ⊗ Q_R                      Vyas et al. 2024
    dykaf           L ⊗ R by projector splitting over the rows                    Yudin et al. 2025
    kl              L = Σ G_r R⁻¹ G_rᵀ / n, R = Σ G_rᵀ L⁻¹ G_r / m                Lin et al. 2025
    nearest         the L ⊗ R of least |F - L ⊗ R|_F                              Van Loan and Pitsianis 1993

In training Shampoo, SOAP, DyKAF and KL see gradients of mini-batch means; here they are given what K-FAC is given.
Nothing that is a Kronecker product is nearer in Frobenius norm than `nearest`, and nothing diagonal in its basis than
`ekfac` and `soap` in theirs.
"""

import functools
import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..._arguments import in_range
from ...capture.gradients import value_and_grad
from ...capture.kinds.kronecker import KroneckerFactors
from ...capture.kinds.sums import check_counts
from ...linalg import eigenbasis
from ...matrices.layout import Layer
from ...preconditioner.factors import projector_splitting
from .fitted_products import eigenpairs, of_least_distance, of_least_divergence
from .layer_forms import ByOutput, Entries, Form, LayerForms, Product, Rotated, RowSum, einsum, in_bases
from .layer_rows import LayerRows, Source, dense, layers_in, rows_of
from .operator import Operator

__all__ = ["METHODS", "approximate", "dense"]


def approximate(
    method: str,
    loss_fn: Callable[..., PyTree],
    params: PyTree,
    *batch: PyTree,
    fisher: str = "true",
    n_samples: int = 1,
    temperature: float = 1.0,
    key: PRNGKeyArray | None = None,
    batch_size: int | None = None,
    **options: object,
) -> Operator:
    """The Fisher of a model as one of the methods at the top of this file sees it, on trees like the parameters.

    Layers are the matrices that `fo.infer_axes` finds; those of a stacked kernel are layers of their own. Every other
    leaf (embeddings, norms) has its exact block, by all methods. A product costs what one with the factors does.

    Args:
      method: one of ``METHODS``, or "nearest_kronecker", which is "nearest".
      loss_fn, params, *batch, fisher, n_samples, temperature, key: as in `operator`; ``fisher`` is "true", "mc" or
        "empirical". "kfac" and "ekfac" have no temperature, and draw labels of their own for A and B.
      batch_size: None: all rows are made at once, r D numbers for r rows and D parameters, at r backward passes of the
        whole batch. Else of so many examples at once, each differentiated alone, which is faster too, if the loss is
        the (weighted) mean of losses of single examples (see `dense`). "block_diagonal", "kl" and "nearest" hold a
        layer's rows or its (mn)² entries, whichever are fewer, in any case.
      mode: ("kfac", "ekfac") as in `fo.KroneckerFactors`.
      trace_scaled: ("shampoo") ``L ⊗ R / tr L``, exact where F is a Kronecker product; False by default, the paper's.
      sweeps: ("dykaf") how often it passes over the rows, 1 by default.
      ridge: ("kl") that of ``F + ε I``, in units of F's mean diagonal, .001 by default: undamped, a singular F has no
        nearest product. 0 for none (but rounding).

    Raises:
      ValueError, TypeError: for an unknown method or option; as `operator`, `fo.value_and_grad` and `dense`.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> loss = lambda W, x, y: fo.losses.softmax_cross_entropy(x @ W, y)
      >>> x, y = jnp.array([[1.0], [2.0]]), jnp.array([0, 1])
      >>> D = approximate("diagonal", loss, jnp.zeros((1, 2)), x, y)
      >>> print((D @ jnp.ones((1, 2))).round(3))
      [[0.625 0.625]]
    """
    method = {"nearest_kronecker": "nearest"}.get(method, method)
    if method not in METHODS:
        raise ValueError(f"approximate: method must be one of {', '.join(map(repr, METHODS))}; got {method!r}.")
    known = list(inspect.signature(METHODS[method]).parameters)[1:]
    if unknown := sorted(options.keys() - set(known)):
        has = f"has {', '.join(known)}" if known else "has none"
        raise TypeError(f"approximate: {method!r} has no option {unknown[0]!r}; it {has}.")
    if method in ("kfac", "ekfac") and temperature != 1:
        raise ValueError(f"{method}: its factors are of labels at temperature 1; got temperature={temperature}.")
    rows = rows_of(loss_fn, params, batch, fisher, n_samples, temperature, key, batch_size)
    layers = layers_in(rows.source.loss_fn, rows.params, rows.batch)
    forms = _forms(method, tuple(sorted(options.items())), rows.source, layers, rows.params, rows.batch, key)
    return Operator.on(f"{method} of the {fisher} Fisher", LayerForms(layers), forms, params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _forms(
    method: str,
    options: tuple[tuple[str, object], ...],
    source: Source,
    layers: tuple[Layer, ...],
    params: PyTree,
    batch: PyTree,
    key: PRNGKeyArray | None,
) -> list[Form]:
    rows = LayerRows(source, layers, params, batch, key)
    return [*METHODS[method](rows, **dict(options)), *rows.exact(layers=False)]


def block_diagonal(rows: LayerRows) -> list[RowSum | Entries]:
    """The exact block of each layer."""
    return rows.exact()


def diagonal(rows: LayerRows) -> list[Rotated]:
    """The Fisher's diagonal."""
    return [Rotated(None, None, S) for S in rows.sum(lambda G: jnp.sum(jnp.square(G), 0))]


def rowwise(rows: LayerRows) -> list[ByOutput]:
    """FROG: the exact block of each output of a layer, nothing between two outputs."""
    return [ByOutput(F) for F in rows.sum(lambda G: einsum("raij,rakj->ajik", G, G))]


def kfac(rows: LayerRows, mode: str = "expand") -> list[Product]:
    """K-FAC: as if a layer's inputs and output gradients were independent."""
    return [Product(A, B) for A, B in _input_and_output_factors(rows, mode)]


def ekfac(rows: LayerRows, mode: str = "expand") -> list[Rotated]:
    """EKFAC: the Fisher's own diagonal in the eigenbasis of K-FAC."""
    return _with_own_diagonal(rows, _input_and_output_factors(rows, mode))


def shampoo(rows: LayerRows, trace_scaled: bool = False) -> list[Product]:
    """Shampoo: the root of the Kronecker product of both second moments, or their product at the Fisher's trace."""
    if trace_scaled:
        return [Product(_over_trace(L), R) for L, R in _gradient_factors(rows)]
    return [Product(_root(L), _root(R)) for L, R in _gradient_factors(rows)]


def soap(rows: LayerRows) -> list[Rotated]:
    """SOAP: the Fisher's own diagonal in the eigenbasis of Shampoo."""
    return _with_own_diagonal(rows, _gradient_factors(rows))


def dykaf(rows: LayerRows, sweeps: int = 1) -> list[Product]:
    """DyKAF: projector splitting over the rows, each weighed so that what is followed is their sum."""
    # The running mean of rows times √r is in the end their sum.
    check_counts("dykaf", sweeps=sweeps)
    r, dtype = rows.number, rows.shape.dtype
    rule = projector_splitting(lambda count: jnp.asarray(count, dtype) / (count + 1))

    def over(state: PyTree, G: Array) -> PyTree:
        # Matrix by matrix: the start's decomposition is then made once, where a vmap makes it in every step.
        of_matrix = lambda xs: jax.lax.scan(lambda s, g: (rule.update(g, s, None), None), *xs)[0]  # noqa: E731
        return jax.lax.map(of_matrix, (state, jnp.swapaxes(G, 0, 1) * r**0.5))

    def step(states: list[PyTree], R: Array) -> tuple[list[PyTree], tuple[()]]:
        return [over(s, G) for s, G in zip(states, rows.matrices(R), strict=False)], ()

    def start(N: int, m: int, n: int) -> PyTree:
        return jax.vmap(lambda _: rule.init(m, n, True, True, dtype))(jnp.zeros(N))

    starts = [start(*x.shape[1:]) for x in jax.eval_shape(rows.matrices, rows.shape)[: len(rows.layers)]]
    found = jax.lax.fori_loop(0, sweeps, lambda _, states: rows.fold(step, states)[0], starts)
    return [Product(state.left, state.right) for state in found]


def kl(rows: LayerRows, ridge: float = 1e-3) -> list[Product]:
    """KL-Shampoo: the product of least KL(N(0, F + ε I) | N(0, L ⊗ R)), by alternating between both factors."""
    in_range("kl: ridge", ridge, 0)
    return [jax.lax.map(functools.partial(of_least_divergence, ridge=ridge), block) for block in rows.exact()]


def nearest(rows: LayerRows) -> list[Product]:
    """The nearest Kronecker product in Frobenius norm, by power iteration: what no other can be nearer than."""
    return [jax.lax.map(of_least_distance, block) for block in rows.exact()]


METHODS: dict[str, Callable[..., Sequence[Form]]] = {
    f.__name__: f for f in (block_diagonal, diagonal, rowwise, kfac, ekfac, shampoo, soap, dykaf, kl, nearest)
}


def _input_and_output_factors(rows: LayerRows, mode: str) -> list[tuple[Array, Array]]:
    """A and B of each layer, by capture."""
    s, kind = rows.source, KroneckerFactors(mode=mode, max_dim=2**31)
    grad_fn = value_and_grad(s.loss_fn, kind, fisher=s.fisher, n_samples=s.n_samples)

    def factors(batch: PyTree, key: PRNGKeyArray | None, share: Array | float) -> list[tuple[Array, Array, Array]]:
        found = jax.tree.structure(rows.params).flatten_up_to(grad_fn(rows.params, *batch, fisher_key=key)[2])
        statistics = [found[layer.kernel] for layer in rows.layers]
        each = [[f.left, f.right, f.weight[..., None, None]] for f in statistics]  # experts have a weight each
        return [(w * A, share * B, w) for A, B, w in ((y.reshape(-1, *y.shape[-2:]) for y in x) for x in each)]

    if s.batch_size is None:
        found = factors(rows.batch, rows.key, 1.0)
    else:
        rows.require_one_loss()

        def on_chunk(sums: PyTree, numbers: Array, examples: PyTree, shares: list[Array]) -> tuple[PyTree, tuple[()]]:
            new = factors(examples, rows.key_of(numbers[0]), jnp.sum(shares[0]))
            return jax.tree.map(jnp.add, sums, new), ()

        shapes = jax.eval_shape(lambda: factors(rows.batch, rows.key, 1.0))
        found, _ = rows.over_chunks(on_chunk, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    return [(A / jnp.maximum(count, 1), B) for A, B, count in found]


def _gradient_factors(rows: LayerRows) -> list[tuple[Array, Array]]:
    """L and R of each layer."""
    return rows.sum(lambda G: (einsum("raij,rakj->aik", G, G), einsum("raij,rail->ajl", G, G)))


def _with_own_diagonal(rows: LayerRows, factors: list[tuple[Array, Array]]) -> list[Rotated]:
    """The Fisher's diagonal in the eigenbases of these factors."""
    bases = [(eigenbasis(A), eigenbasis(B)) for A, B in factors]
    squares = rows.sum(lambda G, Q: jnp.sum(jnp.square(in_bases(G, *Q)), 0), bases)
    return [Rotated(*Q, S) for Q, S in zip(bases, squares, strict=True)]


def _over_trace(A: Array) -> Array:
    trace = jnp.trace(A, axis1=-2, axis2=-1)[..., None, None]
    return A / jnp.where(trace > 0, trace, 1)


def _root(A: Array) -> Array:
    """``A^½``; what is rounding counts as 0, as its root would not be small."""
    λ, Q = eigenpairs(A)
    return einsum("...ij,...j,...kj->...ik", Q, jnp.sqrt(λ), Q)
