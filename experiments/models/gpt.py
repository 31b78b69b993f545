"""A character-level GPT in Flax linen: nanoGPT's pre-LayerNorm decoder.

Source: Radford et al. 2019 (GPT-2), in the form of https://github.com/karpathy/nanoGPT.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def init_std(width: int) -> float:
    """GPT-2's 0.02 belongs to its width of 768; at other widths this keeps the size of the products."""
    return 0.02 * (768 / width) ** 0.5


class Block(nn.Module):
    """Causal self-attention and an MLP, each added to the residual stream after a LayerNorm of its own."""

    layers: int  # of the whole model: it sets the scale of what is added to the residual stream
    heads: int
    dropout: float
    bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"], train: bool) -> Float[Array, "batch time width"]:
        width = x.shape[-1]
        std = init_std(width)
        residual_std = std / (2 * self.layers) ** 0.5  # 2 * layers additions must not make the stream grow with depth

        def dense(features: int, name: str, std: float = std) -> nn.Dense:
            init = nn.initializers.normal(std)
            return nn.Dense(features, use_bias=self.bias, dtype=self.dtype, kernel_init=init, name=name)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(use_bias=self.bias, dtype=self.dtype, name=name)

        def drop(y: Array) -> Array:
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        q, k, v = jnp.split(dense(3 * width, "qkv")(norm("norm_attention")(x)), 3, axis=-1)
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, k, v))  # (batch, time, heads, width / heads)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        attention = drop(jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)).astype(self.dtype))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", attention, v).reshape(x.shape)
        x = x + drop(dense(width, "proj", residual_std)(mixed))

        hidden = nn.gelu(dense(4 * width, "up")(norm("norm_mlp")(x)))
        return x + drop(dense(width, "down", residual_std)(hidden))


class GPT(nn.Module):
    """Decoder-only transformer whose output layer is its embedding matrix (``tied``), or a Dense layer ``head``.

    Each weight matrix is the kernel of a `flax.linen.Dense` (``qkv``, ``proj``, ``up``, ``down``), inputs first; the
    embeddings are `flax.linen.Embed`. Parameters and logits are float32 whatever ``dtype`` is.

    Args:
        vocabulary: number of symbols.
        context: largest number of positions; a shorter input is fine.
        layers, width, heads: blocks, width of the residual stream, attention heads (``heads`` divides ``width``).
        dropout: rate on embeddings, attention weights and both branches; with ``train=True`` it needs
            ``rngs={"dropout": key}``.
        bias: give the dense layers and the norms a bias. Off by default, as in nanoGPT: faster and no worse.
        tied: the output layer is the embedding, as in nanoGPT; otherwise one of its own.
        dtype: of the computation: ``jnp.float32`` or, on hardware that has it, ``jnp.bfloat16``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = GPT(vocabulary=97, context=64, layers=4, width=128, heads=4)
        >>> tokens = jnp.zeros((2, 64), jnp.int32)
        >>> params = model.init(jax.random.key(0), tokens)["params"]
        >>> model.apply({"params": params}, tokens).shape
        (2, 64, 97)
        >>> sum(leaf.size for leaf in jax.tree.leaves(params))
        808192
    """

    vocabulary: int
    context: int
    layers: int
    width: int
    heads: int
    dropout: float = 0.0
    bias: bool = False
    dtype: jnp.dtype = jnp.dtype("float32")
    tied: bool = True

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch time"], train: bool = False) -> Float[Array, "batch time vocabulary"]:
        def embedding(symbols: int, name: str) -> nn.Embed:
            init = nn.initializers.normal(init_std(self.width))
            return nn.Embed(symbols, self.width, dtype=self.dtype, embedding_init=init, name=name)

        embed = embedding(self.vocabulary, "embed")
        x = embed(tokens) + embedding(self.context, "position")(jnp.arange(tokens.shape[1]))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for layer in range(self.layers):
            x = Block(self.layers, self.heads, self.dropout, self.bias, self.dtype, name=f"block_{layer}")(x, train)
        x = nn.LayerNorm(use_bias=self.bias, dtype=self.dtype, name="norm")(x)
        if self.tied:
            return embed.attend(x).astype(jnp.float32)
        init = nn.initializers.normal(init_std(self.width))
        head = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, kernel_init=init, name="head")
        return head(x).astype(jnp.float32)
