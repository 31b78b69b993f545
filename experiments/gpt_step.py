"""A training step of a GPT: the mean gradient over all tokens of a batch, accumulated over micro-batches in a loop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.models.gpt import GPT


class Preset(NamedTuple):
    """A GPT, and what it sees in a step."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int
    micro_batch: int  # windows in one backward pass
    micro_batches: int
    dtype: str  # of the model's computation; parameters and gradients are float32

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.micro_batches * self.micro_batch * self.context

    @property
    def model(self) -> GPT:
        shape = (self.vocabulary, self.context, self.layers, self.width, self.heads)
        return GPT(*shape, dtype=jnp.dtype(self.dtype))


PRESETS = {
    "small": Preset(6, 384, 6, 65, 256, micro_batch=16, micro_batches=4, dtype="float32"),
    "gpt2": Preset(12, 768, 12, 50_304, 1024, micro_batch=16, micro_batches=32, dtype="bfloat16"),
}


def make_gradient(preset: Preset) -> Callable[[Any, Any], Any]:
    """The gradient of the mean loss over all micro-batches, summed up in float32 by a loop."""

    def loss(params: Any, windows: Any) -> Any:
        logits = jnp.asarray(preset.model.apply({"params": params}, windows[:, :-1]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def gradient(params: Any, tokens: Any) -> Any:
        def add(total: Any, windows: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, windows)), None

        total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), tokens)
        return jax.tree.map(lambda x: x / len(tokens), total)

    return gradient
