"""Mixtures of experts as ragged products, in the forms in which models write them, and the same expert by expert."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import RaggedDotDimensionNumbers

import fisher_optax as fo
from tests.capture.capture_models import assert_near
from tests.reference.curvature import factors


def drawn(*shape: int) -> np.ndarray:
    """Normal numbers, the same for a shape each time."""
    return np.random.default_rng(shape).normal(size=shape)


E, ROWS, M, H, N = 4, 12, 3, 5, 2
SIZES = np.array([3, 0, 5, 2])  # the last two rows are nobody's
ENDS = np.cumsum(SIZES)
PARAMS = {"up": drawn(E, M, H), "down": drawn(E, H, N)}
X = drawn(ROWS, M)


def experts(x: Any, W: Any, sizes: Any) -> Any:
    return jax.lax.ragged_dot(x, W, sizes)


def general(x: Any, W: Any, sizes: Any, *, dot: Any = ((1,), (1,)), ragged: int = 0, group: int = 0) -> Any:
    numbers = RaggedDotDimensionNumbers((dot, ((), ())), (ragged,), (group,))
    return jax.lax.ragged_dot_general(x, W, sizes, numbers)


@jax.custom_vjp
def with_own_derivative(x: Any, W: Any, sizes: Any) -> Any:
    return experts(x, W, sizes.astype(jnp.int32))


def forwards(x: Any, W: Any, sizes: Any) -> Any:
    return with_own_derivative(x, W, sizes), (x, W, sizes)


def backwards(operands: Any, ct: Any) -> Any:
    x, W, sizes = operands
    dx, dW = jax.vjp(lambda x, W: experts(x, W, sizes), x, W)[1](ct)
    return dx, dW, np.zeros(sizes.shape, jax.dtypes.float0)


with_own_derivative.defvjp(forwards, backwards)

# How models write the product, and the axes of the parameter that they read in another order.
WRITTEN: dict[str, tuple[Any, Any]] = {
    "ragged_dot": (experts, (0, 1, 2)),
    "general": (general, (0, 1, 2)),
    "outputs first": (functools.partial(general, dot=((1,), (2,))), (0, 2, 1)),
    "experts last": (functools.partial(general, dot=((1,), (0,)), group=2), (1, 2, 0)),
    "transposed": (lambda x, W, sizes: experts(x, W.transpose(1, 2, 0), sizes), (2, 0, 1)),
    "its own derivative": (with_own_derivative, (0, 1, 2)),
    "rematerialised": (jax.checkpoint(experts), (0, 1, 2)),
    "two experts an axis": (lambda x, W, sizes: experts(x, W.reshape(E, *W.shape[2:]), sizes), None),
}


def loss(product: Any, params: Any, x: Any, sizes: Any, see: Any) -> Any:
    h = jnp.tanh(see("up", x, product(x, params["up"], sizes)))
    return fo.losses.gaussian(see("down", h, product(h, params["down"], sizes)), jnp.ones((len(x), N)))


def stored(W: Any, order: Any) -> Any:
    """The experts' matrices in the order of axes in which a model has them."""
    return W.reshape(2, 2, *W.shape[1:]) if order is None else np.transpose(W, order)


def by_expert(a: Any, delta: Any, total: float, bias: bool = False) -> Any:
    """Both sides of every expert from its own rows; None where there are none."""
    starts = ENDS - SIZES
    rows = [slice(start, end) for start, end in zip(starts, ENDS, strict=True)]
    return [factors(a[r], delta[r], total, bias) if r.stop > r.start else None for r in rows]


def assert_experts(stats: Any, wanted: Any) -> None:
    for e, sides in enumerate(wanted):
        for found, side in zip((stats.left, stats.right), sides or (None, None), strict=True):
            if side is None:
                assert not np.asarray(found[e]).any()
            else:
                assert_near(found[e], side)


def routed(params: Any, tokens: Any, see: Any, k: int = 2) -> Any:
    """Tokens go to their k best experts and come back, as mixtures of experts do it without dropping any."""
    gates, chosen = jax.lax.top_k(jax.nn.softmax(tokens @ params["router"]), k)
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=E)
    x = jnp.take(tokens, order // k, axis=0)
    h = jax.nn.silu(see("up", x, experts(x, params["up"], sizes)))
    y = see("down", h, experts(h, params["down"], sizes))
    back = jnp.zeros_like(y).at[order].set(y).reshape(len(tokens), k, -1)
    return fo.losses.gaussian(jnp.sum(back * gates[..., None], 1), 1 + 0 * tokens[:, :N])


def masked(params: Any, tokens: Any, see: Any, k: int = 2) -> Any:
    """The same, every expert on all tokens; gates of those it was not sent are 0."""
    gates, chosen = jax.lax.top_k(jax.nn.softmax(tokens @ params["router"]), k)
    out = 0
    for e in range(E):
        gate = jnp.sum(jnp.where(chosen == e, gates, 0), -1)
        h = jax.nn.silu(see(f"up{e}", tokens, tokens @ params["up"][e]))
        out = out + gate[:, None] * see(f"down{e}", h, h @ params["down"][e])
        see(f"sent{e}", gate, jnp.zeros(1))
    return fo.losses.gaussian(out, 1 + 0 * tokens[:, :N])
