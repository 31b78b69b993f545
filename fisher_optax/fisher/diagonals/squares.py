"""Squared gradients of one example, by the unit that is squared.

With g_t the gradient of -log p of token t, w_t its weight, n = Σ w_t, and weight n for the example's place in a mean:

    sequence    (Σ_t √w_t g_t)² / n     what the loss of whole sequences is sensitive to
    token       Σ_t w_t g_t² / n        ... and that of single tokens
A weight counts a token w_t times, so that its score counts √w_t times: then over labels drawn from the model, whose
scores of different tokens are uncorrelated, the two agree in expectation, with weights as without. Over the data's
labels they do not.

All scores of all labels would be n C² numbers for C classes. They are made one label at a time.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ...capture.outputs import Output, outputs
from ..operators.matrix import check_factors, label_score


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
    draws: int  # how many scores a token has, whose squares add up
    scores: Callable[[Array | int], Array]  # number of a draw -> (n, ...): cotangents, each token's times sqrt(w_t)
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
    weights = jnp.ones(n)
    if pair:
        weights = jax.lax.stop_gradient(jnp.asarray(loss_fn(params, example)[1]))
        weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    return Example(losses, 1, lambda _: jnp.sqrt(weights), weights, jnp.asarray(True))


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
    classes = out.labels.ndim == out.weights.ndim and out.name == "softmax_cross_entropy"
    valid = jnp.all((out.labels >= 0) & (out.labels < C)) if classes else jnp.asarray(True)
    logits = lambda p: outputs(loss_fn, p, example)[0][0].logits.reshape(n, C)  # noqa: E731
    # n shares, that is, which say too what the mean is multiplied by.
    times = jnp.sqrt(out.shares * out.total)[..., None]
    draws = {"true": C, "mc": labels.n_samples, "empirical": 1}[labels.fisher]

    def scores(k: Array | int) -> Array:
        made = label_score(out, labels.fisher, labels.n_samples, labels.temperature, 0, key, k)
        return (times.astype(made.dtype) * made).reshape(n, C)

    return Example(logits, draws, scores, out.weights.ravel(), valid)


def check_example(loss_fn: Callable[..., PyTree], params: PyTree, example: PyTree) -> None:
    """A ValueError for what `example_of` makes nothing of, and as `check_factors`."""
    scalar = jax.tree.structure(0), [()]
    made = jax.eval_shape(loss_fn, params, example)
    shapes = jax.tree.structure(made), [x.shape for x in jax.tree.leaves(made)]
    if shapes == scalar and jax.eval_shape(lambda p, e: outputs(loss_fn, p, e)[0], params, example):
        check_factors(loss_fn, params, (example,))


def squares(
    unit: str, exact: bool, reduce: Callable[[PyTree], PyTree], params: PyTree, example: Example
) -> tuple[PyTree, Float[Array, ""]]:
    """One example's x, in groups, and its weight. ``exact``: the scores are of all labels at once, so that those of
    different tokens must not be added up.
    """
    n = jnp.sum(example.weights)
    _, pull = jax.vjp(example.values, params)

    def squared(ct: Array) -> PyTree:
        g = jax.tree.map(lambda x: jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))), pull(ct)[0])
        return reduce(g)

    def of_draw(k: Array | int) -> PyTree:
        scores = example.scores(k)
        if unit == "sequence" and not exact:
            return squared(scores)
        return _added_up(lambda t: squared(jnp.zeros_like(scores).at[t].set(scores[t])), len(scores))

    total = _added_up(of_draw, example.draws)
    x = jax.tree.map(lambda s: s / jnp.where(n > 0, n, 1).astype(s.dtype), total)
    # A wrong label has no gradient that would be missed: the example says so by its weight.
    return x, jnp.where(example.valid, n, jnp.nan)


def _added_up(f: Callable[[Array | int], PyTree], count: int) -> PyTree:
    """``f(0) + f(1) + ...``, one after the other."""
    if count == 1:
        return f(0)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(f, jnp.zeros([], jnp.int32)))
    return jax.lax.scan(lambda total, i: (jax.tree.map(jnp.add, total, f(i)), None), zero, jnp.arange(count))[0]
