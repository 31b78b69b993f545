"""Parameter trees of GPTs, without the models: what an optimizer's step alone is timed on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.peers import hidden as hidden


class Tree(NamedTuple):
    """A GPT in nanoGPT's layout: learned positions, four bias-free kernels a layer, the head tied to the embedding."""

    layers: int
    width: int
    vocabulary: int = 65
    context: int = 256


TREES = {"small": Tree(6, 384), "deep": Tree(12, 256), "gpt2": Tree(12, 768, 50_304, 1024)}


def make_params(tree: Tree, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The tree as ``jax.ShapeDtypeStruct``, named as Flax would."""
    d = tree.width

    def leaf(name: str, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, dtype)}

    block = {
        "ln_1": leaf("scale", d),
        "attn": {"qkv": leaf("kernel", d, 3 * d), "proj": leaf("kernel", d, d)},
        "ln_2": leaf("scale", d),
        "mlp": {"up": leaf("kernel", d, 4 * d), "down": leaf("kernel", 4 * d, d)},
    }
    blocks = {f"block_{i}": block for i in range(tree.layers)}
    embeddings = {"wte": leaf("embedding", tree.vocabulary, d), "wpe": leaf("embedding", tree.context, d)}
    return {**embeddings, **blocks, "ln_f": leaf("scale", d)}


def layers_of(tree: Tree) -> dict[str, Any]:
    """Its blocks alone: four kernels and two scales each, every one a leaf."""
    return {name: x for name, x in make_params(tree).items() if name.startswith("block")}


def random_like(shapes: Any, seed: Any) -> Any:
    """Normal numbers of these shapes and types."""
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True))
