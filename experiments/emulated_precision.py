"""SOAP with products as an accelerator rounds them, emulated on a CPU: what lower precision does to its runs.

A product at "high" multiplies two parts of bfloat16 of each operand, and leaves out the product of the small ones; at
"default" it multiplies the operands rounded to bfloat16, as on a TPU; sums are float32. `fo.Products` says which
products.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisher_optax as fo

matmul = jnp.matmul
RATE = 6e-3
GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "soap.npz"
SIDE, RATIO, NOISE = 8, 0.5, 0.2  # ratio of one singular value of a gradient to the next
WAYS: dict[str, dict[str, Any]] = {
    "highest": {},
    "rotations_high": {"products": fo.Products(rotations="high")},
    "rotations_default": {"products": fo.Products(rotations="default")},
    "factors_high": {"products": fo.Products(factors="high")},
    "factors_default": {"products": fo.Products(factors="default")},
    "basis_high": {"products": fo.Products(basis="high")},
    "basis_default": {"products": fo.Products(basis="default")},
    "cholesky": {"refresh": fo.Refresh(decomposition="cholesky")},
    "cholesky_basis_high": {"refresh": fo.Refresh(decomposition="cholesky"), "products": fo.Products(basis="high")},
}


def emulated(X: jax.Array, Y: jax.Array, precision: Any = None) -> jax.Array:
    """``X Y`` as an accelerator multiplies at this precision."""
    exact = functools.partial(matmul, precision="highest")
    if precision not in ("high", "default"):
        return exact(X, Y)
    (x, x_rest), (y, y_rest) = _rounded(X), _rounded(Y)
    if precision == "default":
        return exact(x, y)
    x_small, y_small = _rounded(x_rest)[0], _rounded(y_rest)[0]
    return exact(x, y) + (exact(x, y_small) + exact(x_small, y))


def _rounded(X: jax.Array) -> tuple[jax.Array, jax.Array]:
    """X rounded to bfloat16, and what is left. XLA takes a cast there and back for none, this not."""
    x = jax.lax.reduce_precision(X, exponent_bits=8, mantissa_bits=7)
    return x, X - x


def gradients(seed: int, steps: int) -> np.ndarray:
    """Of known singular vectors with well-separated singular values, of random signs and with noise between them."""
    rng = np.random.default_rng(seed)
    L, R = (np.linalg.qr(rng.standard_normal((SIDE, SIDE)))[0] * RATIO ** (np.arange(SIDE) / 2) for _ in range(2))
    signs = rng.choice((-1.0, 1.0), (steps, SIDE))[:, None] * np.eye(SIDE)
    return (L @ (signs + NOISE * rng.standard_normal((steps, SIDE, SIDE))) @ R.T).astype(np.float32)


def way(options: dict[str, Any], W: np.ndarray, grads: np.ndarray, **numbers: Any) -> np.ndarray:
    """How far a matrix is from W after these gradients."""
    tx = fo.soap(RATE, **numbers, **options)
    params = {"kernel": jnp.asarray(W, jnp.float32)}

    def step(carry: Any, G: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update({"kernel": G}, state, params)
        return (optax.apply_updates(params, updates), state), None

    start, given = (params, tx.init(params)), jnp.asarray(grads, jnp.float32)
    (params, _), _ = jax.jit(lambda c, Gs: jax.lax.scan(step, c, Gs))(start, given)
    return np.asarray(params["kernel"], np.float64) - W


def apart(name: str, seeds: int) -> list[float]:
    """On separated gradients: as a part of the way, from the run in float32 by QR."""
    return [_distance(name, np.zeros((SIDE, SIDE)), gradients(seed, 100)) for seed in range(seeds)]


def golden(name: str) -> list[float]:
    """The same on the gradients of SOAP's golden trajectories."""
    cases = ("square_f1", "square_f5_wd", "shampoo_beta")
    refreshes = {"square_f1": 1, "square_f5_wd": 5, "shampoo_beta": 2}
    with np.load(GOLDEN) as arrays:
        return [
            _distance(name, arrays[f"{c}/params0"], arrays[f"{c}/grads"], precondition_frequency=refreshes[c])
            for c in cases
        ]


def _distance(name: str, W: np.ndarray, grads: np.ndarray, **numbers: Any) -> float:
    mine, exact = (way(WAYS[key], W, grads, weight_decay=0.0, **numbers) for key in (name, "highest"))
    return float(np.linalg.norm(mine - exact) / np.linalg.norm(exact))
