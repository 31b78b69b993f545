"""Squared gradients of one example, by the unit that is squared.

With g_t the gradient of -log p of token t, n tokens that count in the example, and weight n for its place in a mean:

    sequence    (Σ_t g_t)² / n     what the loss of whole sequences is sensitive to
    token       Σ_t g_t² / n       ... and that of single tokens
Over labels drawn from the model the two agree in expectation, since scores of different tokens are uncorrelated. Over
the data's labels they do not.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ...capture.outputs import Output, outputs
from ..operators.matrix import label_scores


@dataclasses.dataclass(frozen=True)
class Labels:
    """Which labels the gradients are of."""

    fisher: str = "empirical"
    n_samples: int = 1
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class Example:
    """One example as a function of the parameters: what it is differentiated at, and by which cotangents."""

    values: Callable[[PyTree], Array]  # params -> (n, ...): logits of its tokens, or their losses
    scores: Float[Array, "k n ..."]  # cotangents; squares of k draws add up
    weights: Float[Array, " n"]
    valid: Bool[Array, ""]  # whether its labels are classes


def example_of(
    loss_fn: Callable[..., PyTree], labels: Labels, params: PyTree, example: PyTree, key: PRNGKeyArray | None
) -> Example:
    """What ``loss_fn(params, example)`` is: one call of `fo.losses`, the losses of tokens (alone or with weights), or a
    scalar, one token.

    Raises:
      ValueError, TypeError: for anything else, and for labels of the model where it is not a call of `fo.losses`.
    """
    made = jax.eval_shape(loss_fn, params, example)
    shape = tuple(x.shape for x in jax.tree.leaves(made))
    pair = isinstance(made, tuple) and len(shape) == 2 and shape[0] == shape[1] and len(shape[0]) == 1
    if not (pair or (len(shape) == 1 and len(shape[0]) < 2)):
        raise TypeError(
            "example_loss_fn(params, example) must return one example's loss, the losses (n,) of its tokens, or a pair "
            f"of them and their weights (n,); it returned shapes {', '.join(map(str, shape))}."
        )
    if shape == ((),) and (found := outputs(loss_fn, params, example)[0]):
        return _of_logits(loss_fn, labels, params, example, found, key)
    if labels.fisher != "empirical":
        raise ValueError(
            f"fisher={labels.fisher!r} needs the model's distribution: return an example's loss by fo.losses."
        )
    losses = lambda p: jnp.atleast_1d(jax.tree.leaves(loss_fn(p, example))[0])  # noqa: E731
    n = shape[0][0] if shape[0] else 1
    weights = jnp.asarray(loss_fn(params, example)[1], jnp.float32) if pair else jnp.ones(n)
    return Example(losses, jnp.ones((1, n)), jax.lax.stop_gradient(weights), jnp.asarray(True))


def _of_logits(
    loss_fn: Callable[..., PyTree],
    labels: Labels,
    params: PyTree,
    example: PyTree,
    found: list[Output],
    key: PRNGKeyArray | None,
) -> Example:
    if len(found) != 1:
        raise ValueError(f"an example's loss must be one call of fo.losses; example_loss_fn makes {len(found)}.")
    out = found[0]
    C, n = out.logits.shape[-1], out.weights.size
    scores = label_scores(out, labels.fisher, labels.n_samples, labels.temperature, 0, key)
    classes = out.labels.ndim == out.weights.ndim and out.name == "softmax_cross_entropy"
    valid = jnp.all((out.labels >= 0) & (out.labels < C)) if classes else jnp.asarray(True)
    logits = lambda p: outputs(loss_fn, p, example)[0][0].logits.reshape(n, C)  # noqa: E731
    return Example(logits, scores.reshape(-1, n, C), out.weights.ravel(), valid)


def squares(
    unit: str, exact: bool, reduce: Callable[[PyTree], PyTree], params: PyTree, example: Example
) -> tuple[PyTree, Float[Array, ""]]:
    """One example's x, in groups, and its weight. ``exact``: the scores are of all labels at once, so that those of
    different tokens must not be added up.
    """
    n = jnp.sum(example.weights)
    _, pull = jax.vjp(example.values, params)
    tokens = unit == "token" or exact
    K, T = example.scores.shape[:2]

    def squared(ct: Array) -> PyTree:
        g = jax.tree.map(lambda x: jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))), pull(ct)[0])
        return reduce(g)

    def of_draw(ct: Array) -> PyTree:
        w = example.weights.reshape(-1, *[1] * (ct.ndim - 1))
        return squared(w.astype(ct.dtype) * ct)

    def of_token(place: Array) -> PyTree:
        k, t = place // T, place % T
        cotangent = jnp.zeros_like(example.scores[0]).at[t].set(example.scores[k, t])
        return jax.tree.map(lambda x: example.weights[t].astype(x.dtype) * x, squared(cotangent))

    count, each = (K * T, of_token) if tokens else (K, lambda k: of_draw(example.scores[k]))
    like = jax.eval_shape(each, jnp.zeros([], jnp.int32))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    add = lambda total, k: (jax.tree.map(jnp.add, total, each(k)), None)  # noqa: E731
    total = each(jnp.zeros([], jnp.int32)) if count == 1 else jax.lax.scan(add, zero, jnp.arange(count))[0]
    x = jax.tree.map(lambda s: s / jnp.where(n > 0, n, 1).astype(s.dtype), total)
    # A wrong label has no gradient that would be missed: the example says so by its weight.
    return x, jnp.where(example.valid, n, jnp.nan)
