"""Output layers as the program shows them: what follows another layer, and only feeds the loss."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import fisher_optax as fo
from fisher_optax.matrices.rules import resolve_axes
from tests.matrices.axes_models import GPT, MLP, Block, Experts, X, leaf, params_of, scanned

TOKENS = leaf(2, 6, dtype=jnp.int32)


class TwoOutputs(nn.Module):
    """A scanned trunk, logits and a value, neither of them by a telling name."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = scanned(Block, 3, axis=1)(nn.Embed(11, 12)(tokens), None)[0]
        x = nn.remat(nn.Dense)(12, name="between")(x)
        return nn.Dense(11, name="words")(nn.LayerNorm()(x)), nn.Dense(1, name="value")(jax.lax.cond(True, abs, abs, x))


class Mixed(nn.Module):
    """A layer whose result meets a parameter in a product that capture does not know."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.param("mask", nn.initializers.normal(), (12, 12))
        return nn.Dense(12, name="first")(nn.Dense(12, name="zeroth")(x)) @ jnp.tril(w)


CASES: dict[str, tuple[nn.Module, Any, set[str]]] = {
    "two layers": (MLP(), X, {"Dense_1/kernel"}),
    "one layer, which follows none": (nn.Dense(3), X, set()),
    "a tied embedding": (GPT(), TOKENS, {"wte/embedding"}),
    "after a loop, a remat and a branch": (TwoOutputs(), TOKENS, {"words/kernel", "value/kernel"}),
    "experts, a batch of matrices": (Experts(), X, set()),
    "before a product that is not understood": (Mixed(), X, set()),
}


def cross_entropy(out: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(out, jnp.zeros(out.shape[:-1], int)).mean()


@pytest.mark.parametrize("loss_of", [cross_entropy, jnp.sum], ids=["cross entropy", "sum"])
@pytest.mark.parametrize(("module", "x", "heads"), CASES.values(), ids=CASES.keys())
def test_infer_axes_marks_what_only_feeds_the_loss(
    module: nn.Module, x: Any, heads: set[str], loss_of: Callable[[jax.Array], jax.Array]
) -> None:
    params = params_of(module, x)

    def loss(p: Any, x: jax.Array) -> jax.Array:
        return sum((loss_of(out) for out in jax.tree.leaves(module.apply({"params": p}, x))), jnp.zeros(()))

    read = resolve_axes(params, fo.infer_axes(loss, params, x))
    assert {leaf.path for leaf in read if leaf.kind == "head"} == heads


def test_a_marked_head_goes_to_the_fallback_of_muon_and_frog_and_is_a_matrix_to_others() -> None:
    params = {"kernel": jnp.ones((4, 3))}
    methods = {"muon": fo.muon, "frog": fo.frog, "soap": fo.soap, "kfac": fo.kfac}
    for head, want in ((True, "fallback fallback soap kfac"), (False, "muon frog soap kfac")):
        axes = {"kernel": fo.MatrixAxes(head=head)}
        rows = [fo.report(make(1e-3, axes=axes), params).rows[0] for make in methods.values()]
        assert [row.method for row in rows] == want.split()
