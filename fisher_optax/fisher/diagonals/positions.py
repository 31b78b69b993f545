"""Squares of what each position of a layer contributes, for a batch at the cost of little more than its gradient."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from ..._xla import is_of_ragged
from ...capture.gradients import value_and_grad
from ...capture.kinds.squares import PositionSquares, captured, leaf_squares
from ...capture.program.leaves import LeafPlan
from ...capture.traced import trace
from .squares import Labels, example_of


class Summed(NamedTuple):
    """What adds up over examples."""

    squares: list[Array | None]  # by leaf
    tokens: Float[Array, ""]
    wrong: Int[Array, ""]


def position_squares(
    loss_fn: Callable[..., PyTree], labels: Labels, params: PyTree, batch: PyTree, keys: Array | None
) -> tuple[PyTree, Float[Array, ""], Int[Array, ""]]:
    """``Σ_s a_s² δ_s² / n`` over all positions of a batch of examples, δ of the sum of its tokens' losses times √w, n
    the weights of its tokens, n, and how many examples have a label that is no class.

    Leaves that are used in other ways than products are None, with a warning that names them.
    """
    together = lambda f, *stacks: jax.vmap(f)(*stacks)  # noqa: E731
    try:
        found = _summed(together, loss_fn, labels, params, batch, keys)
    except NotImplementedError as error:
        if not is_of_ragged(error):
            raise
        alone = lambda f, *entries: jax.tree.map(lambda x: x[None], f(*entries))  # noqa: E731
        each = jax.lax.map(lambda x: _summed(alone, loss_fn, labels, params, *x), (batch, keys))
        found = jax.tree.map(lambda x: jnp.sum(x, 0, dtype=x.dtype), each)
    n = found.tokens
    x = [None if s is None else s / jnp.where(n > 0, n, 1).astype(s.dtype) for s in found.squares]
    return jax.tree.structure(params).unflatten(x), n, found.wrong


def _summed(
    over: Callable[..., PyTree],
    loss_fn: Callable[..., PyTree],
    labels: Labels,
    params: PyTree,
    batch: PyTree,
    keys: Array | None,
) -> Summed:
    """Over the examples of a batch; ``over`` makes a function of one into one of all, stacked."""
    kind = PositionSquares()

    def of_example(example: PyTree, key: PRNGKeyArray | None) -> tuple[Array, Array, Array]:
        made = example_of(loss_fn, labels, params, example, key)
        scores = jax.vmap(made.scores)(jnp.arange(made.draws))
        return jnp.where(made.valid, scores, 0), jnp.where(made.valid, jnp.sum(made.weights), 0), ~made.valid

    # The scores are arguments of what is traced: computed inside, each layer would be found twice.
    scores, tokens, wrong = over(of_example, batch, keys)

    def along(params: PyTree, scores: Array, batch: PyTree) -> Array:
        """Its gradient is that of all examples' losses together."""

        def along_scores(example: PyTree, key: PRNGKeyArray | None) -> Array:
            return example_of(loss_fn, labels, params, example, key).values(params)

        values = over(along_scores, batch, keys)
        return jnp.vdot(scores, values.astype(scores.dtype))

    leaves = trace(along, kind, params, (scores[:, 0], batch), {}).leaves
    _warn_of_missing(leaves)
    structure, grad_fn = jax.tree.structure(params), value_and_grad(along, kind, normalizer=1.0)

    def of_draw(s: Array) -> list[Array | None]:
        return leaf_squares(leaves, structure.flatten_up_to(grad_fn(params, s, batch)[2]))

    draws = jnp.moveaxis(scores, 1, 0)
    total = of_draw(draws[0])
    if len(draws) > 1:
        total = jax.lax.scan(lambda t, s: (jax.tree.map(jnp.add, t, of_draw(s)), None), total, draws[1:])[0]
    return Summed(total, jnp.sum(tokens), jnp.sum(wrong, dtype=jnp.int32))


def _warn_of_missing(leaves: list[LeafPlan]) -> None:
    missing = [f"{leaf.path!r} ({leaf.reason or leaf.use})" for leaf in leaves if not captured(leaf, leaves)]
    if missing:
        warnings.warn(
            f"unit='position' sees products with parameters alone; without it stay {', '.join(missing)}. "
            "unit='sequence' and unit='token' see all.",
            stacklevel=2,
        )
