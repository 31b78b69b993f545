"""FROG and K-FROG: natural gradients by a few steps of conjugate gradients on sampled examples.

For one layer with matrix ``M: (D, n)``, rows ``X: (r, D)`` of inputs (a position of a dense layer, a patch of a
convolution; ending in a 1 where the layer has a bias) and ``Y: (r, n)`` of gradients at the outputs. Each output j has
a Fisher of its own, over its D weights:

    Λ_ij = D Y_ij² / Σ_i' Y_i'j² |X_i'|²                    so that the mean eigenvalue of Xᵀ diag(Λ_:j) X is 1
    Z    ← k steps of conjugate gradients from 0 on  Xᵀ (Λ ∘ (X Z)) + τ Z = M,  all outputs at once
    Z_j  ← Z_j / sqrt(<Z_j, M_j>)

It is the published ``(Y_ij² / r) / (1/(rD) Σ ...)``, whose r cancels. In a convolution i runs over the patches of all
examples, in the numerator as in the sum, and Y is not summed over places; so it follows the author's trajectories.
Z does not change with the scales of M, X and Y, and τ counts mean eigenvalues.

K-FROG takes one Fisher for all outputs, of the inputs alone, and has about the power -1/2 on them:

    Z    ← k steps on  (XᵀX / r + ε I) Z = V,   V_j = M_j / sqrt(mean_i Y_ij²)
    Z    ← sqrt(diag(XᵀX / r)) ∘ Z

X is never written out for a convolution: X(·) is the convolution with the layer's inputs and Xᵀ(·) its transpose, the
gradient of a kernel.

Source: FROG: Fisher row-wise preconditioning, technical overview (fullfix.github.io/notes/2026/01/25/frog-optimizer).
  Its rows, the weights of one output, are columns here. The released code adds 1e-10 to both denominators of conjugate
  gradients, which moves a step by up to 4e-7 of itself; here they are guarded instead.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ...linalg import conjugate_gradient
from ...matrices.axes import MatrixAxes, Part, parts_of
from ...matrices.blocks import canonical_shape, divide, from_matrices, to_matrices, unite
from ...statistics import Samples, Window

Solve = Callable[[Array, Array, Array, Window | None, ArrayLike, int], Array]  # `frog_direction` or `kfrog_direction`


class Inputs(NamedTuple):
    """X as an operator; `rows` by which it multiplies are ``(r, *places)``."""

    inputs: Float[Array, "r *places c"]
    bias_input: Float[Array, ""] | None  # the input of the bias, scaled as the others; None: no bias
    window: Window | None

    @property
    def width(self) -> int:
        """D."""
        c = self.inputs.shape[-1]
        return c * math.prod(self.window.shape if self.window else ()) + (self.bias_input is not None)

    def squared(self) -> "Inputs":
        """``X ∘ X``, whose products with ones are ``|X_i|²`` and the diagonal of ``XᵀX``."""
        return Inputs(self.inputs**2, None if self.bias_input is None else self.bias_input**2, self.window)

    def times(self, V: Float[Array, "d n"]) -> Float[Array, "r *places n"]:
        """``X V``."""
        W = V if self.bias_input is None else V[:-1]
        if self.window is None:
            XW = jnp.matmul(self.inputs, W, precision=Precision.HIGHEST)
        else:
            k, channels = len(self.window.shape), self.inputs.shape[-1]
            last, kernel = (0, k + 1, *range(1, k + 1)), (k + 1, k, *range(k))
            XW = jax.lax.conv_general_dilated(
                self.inputs,
                W.reshape(*self.window.shape, channels, W.shape[-1]),
                self.window.strides,
                self.window.padding,
                self.window.lhs_dilation,
                self.window.rhs_dilation,
                jax.lax.ConvDimensionNumbers(last, kernel, last),
                precision=Precision.HIGHEST,
            )
        return XW if self.bias_input is None else XW + self.bias_input * V[-1][(None,) * (XW.ndim - 1)]

    def transposed_times(self, U: Float[Array, "r *places n"]) -> Float[Array, "d n"]:
        """``Xᵀ U``."""
        V = jax.ShapeDtypeStruct((self.width, U.shape[-1]), U.dtype)
        return jax.linear_transpose(self.times, V)(U)[0]


def in_stack(
    solve: Solve, M: Float[Array, "*stack d n"], samples: Samples, damping: ArrayLike, iterations: int
) -> Array:
    """The direction of one layer, or of each of a stack of them, in the dtype of M.

    M has a row more than the inputs have columns where it ends with a bias.
    """

    def of_layer(M: Array, x: Array, y: Array) -> Array:
        return solve(M, x, y, samples.window, damping, iterations)

    x, y = (a.astype(M.dtype) for a in (samples.inputs, samples.gradients))
    if M.ndim == 2:
        return of_layer(M, x, y)
    return jax.vmap(of_layer)(M, *(a.reshape(len(M), *a.shape[-_rank(samples.window) :]) for a in (x, y)))


def in_parts(
    solve: Solve, M: Float[Array, "*stack d n"], samples: Samples, axes: MatrixAxes, damping: ArrayLike, iterations: int
) -> Array:
    """`in_stack` of each part of a layer that these axes divide; a bias's row is in the last part of the inputs."""
    if not axes.parts:
        return in_stack(solve, M, samples, damping, iterations)
    done = []
    for cut, part in zip(divide(M, axes), parts_of(M.shape, axes), strict=True):
        (X,) = to_matrices(cut, part.axes)
        own = _of_part(samples, part, math.prod(M.shape[:-2]))
        Z = in_stack(solve, X.reshape(-1, *X.shape[-2:]), own, damping, iterations)
        done.append(from_matrices((Z.reshape(X.shape),), part.shape, part.axes))
    return unite(done, M.shape, axes)


def _of_part(samples: Samples, part: Part, N: int) -> Samples:
    """The samples of equal parts of each of N matrices: their inputs, and the gradients at their outputs."""
    rank, (*_, m, n) = _rank(samples.window), canonical_shape(part.shape, part.axes)
    rows, columns = part.span[-2:]
    height, width = ((span.stop - span.start) // d for span, d in zip((rows, columns), (m, n), strict=True))
    x, y = (a.reshape(N, *a.shape[-rank:]) for a in (samples.inputs, samples.gradients))
    if samples.window is None:  # where there is one, inputs are whole
        x = x[..., rows]
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], height, -1), -2, 1)[:, :, None]
    y = jnp.moveaxis(y[..., columns].reshape(*y.shape[:-1], width, n), -2, 1)[:, None]
    x, y = (jnp.broadcast_to(a, (N, height, width, *a.shape[3:])).reshape(-1, *a.shape[3:]) for a in (x, y))
    return dataclasses.replace(samples, inputs=x, gradients=y)


def check_samples(path: str, samples: Samples, shape: tuple[int, ...], bias: bool) -> None:
    """A ValueError unless ``samples`` are those of a layer whose matrix, a row for its bias included, has ``shape``."""
    *stack, d, n = shape
    x, y, rank = samples.inputs.shape, samples.gradients.shape, _rank(samples.window)
    width = math.prod(samples.window.shape if samples.window else ()) * x[-1] + bias
    same = len(x) == len(y) and x[: 1 - rank] == y[: 1 - rank] and math.prod(x[:-rank]) == math.prod(stack)
    if (width, y[-1]) != (d, n) or not same or len(x) < rank or not x[-rank]:
        kernel = f"window {samples.window.shape}" if samples.window else "no window"
        raise ValueError(
            f"samples of {path!r} have inputs {x} and gradients {y} ({kernel}), which do not fit its {d - bias} inputs "
            f"and {n} outputs{f', {stack[0]} times' if stack else ''}; wanted at least one example and (r, inputs), "
            "(r, outputs), or with a window (r, *places, channels). Take them from the same model and axes."
        )


def frog_direction(
    M: Float[Array, "d n"],
    x: Float[Array, "r *places c"],
    y: Float[Array, "r *out_places n"],
    window: Window | None,
    damping: ArrayLike,
    iterations: int,
) -> Float[Array, "d n"]:
    """FROG's Z. An output whose samples are all zero says nothing about its Fisher, which is then taken as I."""
    X, _ = _scaled(x, window, M.shape[0], 0)
    rows, columns = tuple(range(y.ndim - 1)), (None,) * (y.ndim - 1)
    (Y, _), (M, _) = _unit(y, rows), _unit(M, 0)
    size = X.squared().times(jnp.ones((X.width, 1), M.dtype))  # |X_i|²
    trace = jnp.sum(Y**2 * size, axis=rows) / X.width
    known = trace > 0
    Λ = Y**2 * (known / jnp.where(known, trace, 1))[columns]
    τ = (jnp.asarray(damping, M.dtype) + ~known)[None]
    Z = _solution(X, Λ, τ, M, iterations)
    ZM = jnp.sum(Z * M, axis=0, keepdims=True)
    return Z * jnp.where(ZM > 0, jax.lax.rsqrt(jnp.where(ZM > 0, ZM, 1)), 0)


def kfrog_direction(
    M: Float[Array, "d n"],
    x: Float[Array, "r *places c"],
    y: Float[Array, "r *out_places n"],
    window: Window | None,
    damping: ArrayLike,
    iterations: int,
) -> Float[Array, "d n"]:
    """K-FROG's Z. An output whose samples are all zero does not move: nothing says how far."""
    ε = jnp.asarray(damping, M.dtype)
    X, u = _scaled(x, window, M.shape[0], jnp.sqrt(ε))
    rows = tuple(range(y.ndim - 1))
    r = math.prod(y.shape[:-1])
    Y, largest = _unit(y, rows)
    rms = (largest * jnp.sqrt(jnp.mean(Y**2, axis=rows, keepdims=True))).reshape(1, -1)
    V, scale = _unit(M, 0)
    # With X in units of u, which also holds ε, nothing overflows that the result does not.
    Z = _solution(X, jnp.asarray(1 / r, M.dtype), ε / u / u, V, iterations)
    diagonal = X.squared().transposed_times(jnp.ones((*y.shape[:-1], 1), M.dtype)) / r
    return jnp.where(rms > 0, jnp.sqrt(diagonal) * Z / u * (scale / jnp.where(rms > 0, rms, 1)), 0)


def _solution(X: Inputs, Λ: Array, τ: Array, M: Float[Array, "d n"], iterations: int) -> Float[Array, "d n"]:
    """So many steps towards Z with ``Xᵀ (Λ ∘ (X Z)) + τ Z = M``, by one product with X or Xᵀ less than two a step."""

    def product(V: Array) -> Array:
        return X.transposed_times(Λ * X.times(V)) + τ * V

    def energy(V: Array) -> Array:
        XV = X.times(V)
        return jnp.sum(Λ * XV**2, axis=tuple(range(XV.ndim - 1)))[None] + τ * jnp.sum(V**2, axis=0, keepdims=True)

    return conjugate_gradient(product, M, iterations, energy)


def _scaled(x: Array, window: Window | None, rows: int, least: ArrayLike) -> tuple[Inputs, Array]:
    """X divided by u, for a matrix of so many rows: the root of ``least²`` plus the square of X's largest entry."""
    width = x.shape[-1] * math.prod(window.shape if window else ())
    bias = rows > width
    largest = jnp.max(jnp.abs(x), initial=1 if bias else 0)
    u = jnp.hypot(largest, jnp.asarray(least, x.dtype))
    u = jnp.where(u > 0, u, 1)
    return Inputs(x / u, 1 / u if bias else None, window), u


def _unit(x: Array, axes: int | tuple[int, ...]) -> tuple[Array, Array]:
    """x divided by its largest magnitudes over those axes, and these; zero stays zero, divided by 1."""
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
    largest = jnp.where(largest > 0, largest, 1)
    return x / largest, largest


def _rank(window: Window | None) -> int:
    """Of the inputs of one layer."""
    return 2 + len(window.shape if window else ())
