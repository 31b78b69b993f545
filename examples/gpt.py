"""What `train_gpt.py` trains: a text as tokens, nanoGPT's decoder in Flax linen, and how it writes.

Source: Radford et al. 2019 (GPT-2), in the form of https://github.com/karpathy/nanoGPT.
"""

import sys
import sysconfig
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fisher_optax as fo


def read_text(file=None):
    """A text as tokens, and the character of each token: the 96 most frequent ones, and one for all the others.

    ``file`` is a path; by default the text is four million characters of the Python standard library's sources.
    """
    files = [Path(file)] if file else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    try:
        text = "".join(path.read_text(encoding="utf-8") for path in files)
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"cannot read the text: {error}. Give a file in UTF-8 by --text FILE.")
    if len(text) < 10_000:
        sys.exit(f"the text has only {len(text):,} characters. Give one of 10,000 or more by --text FILE.")
    points, counts = np.unique(np.frombuffer(text[:4_000_000].encode("utf-32-le"), np.uint32), return_counts=True)
    characters = [*map(chr, np.sort(points[np.argsort(-counts)[:96]])), "\N{REPLACEMENT CHARACTER}"]
    token_of = {character: token for token, character in enumerate(characters)}
    return np.array([token_of.get(c, len(characters) - 1) for c in text[:4_000_000]], np.int32), characters


def normal(width, scale=1.0):
    """GPT-2's 0.02 belongs to its width of 768; at other widths this keeps the size of the products."""
    return nn.initializers.normal(scale * 0.02 * (768 / width) ** 0.5)


class Block(nn.Module):
    """Causal self-attention and an MLP, each added to the residual stream after a LayerNorm of its own."""

    layers: int  # of the whole model
    heads: int

    @nn.compact
    def __call__(self, x):  # (batch, time, width)
        width = x.shape[-1]
        # 2 * layers additions must not make the residual stream grow with depth.
        residual = normal(width, (2 * self.layers) ** -0.5)

        def dense(features, name, init):
            return nn.Dense(features, use_bias=False, kernel_init=init, name=name)

        y = nn.LayerNorm(use_bias=False, name="norm_attention")(x)
        q, k, v = jnp.split(dense(3 * width, "qkv", normal(width))(y), 3, axis=-1)
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, k, v))  # (batch, time, heads, width / heads)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + dense(width, "proj", residual)(y)

        y = nn.LayerNorm(use_bias=False, name="norm_mlp")(x)
        y = nn.gelu(dense(4 * width, "up", normal(width))(y))
        return x + dense(width, "down", residual)(y)


class GPT(nn.Module):
    """Decoder-only transformer whose output layer is its embedding matrix.

    Args:
        vocabulary: number of symbols.
        context: largest number of positions; a shorter input is fine.
        layers, width, heads: blocks, width of the residual stream, attention heads (``heads`` divides ``width``).
    """

    vocabulary: int
    context: int = 64
    layers: int = 4
    width: int = 128
    heads: int = 4

    @nn.compact
    def __call__(self, tokens):  # (batch, time) -> logits (batch, time, vocabulary)
        embed = nn.Embed(self.vocabulary, self.width, embedding_init=normal(self.width), name="embed")
        position = nn.Embed(self.context, self.width, embedding_init=normal(self.width), name="position")
        x = embed(tokens) + position(jnp.arange(tokens.shape[1]))
        for layer in range(self.layers):
            x = Block(self.layers, self.heads, name=f"block_{layer}")(x)
        return embed.attend(nn.LayerNorm(use_bias=False, name="norm")(x))


def loss_of(model):
    """Mean cross-entropy, in nats per character, over the windows of ``text`` that begin at ``first``."""

    def loss_fn(params, text, first):
        windows = text[first[:, None] + jnp.arange(model.context + 1)]  # the last character is a label alone
        return fo.losses.softmax_cross_entropy(model.apply({"params": params}, windows[:, :-1]), windows[:, 1:])

    return loss_fn


def generate(model, params, prompt, count, key, temperature=0.8):
    """``count`` tokens after ``prompt``, each drawn given the ``model.context`` before it.

    A prompt of at least that length: then every window has one shape, and one program serves all.
    """
    if len(prompt) < model.context:
        raise ValueError(f"the prompt has {len(prompt)} tokens; give at least {model.context}, the model's context.")

    @jax.jit
    def draw(window, key):
        return jax.random.categorical(key, model.apply({"params": params}, window[None])[0, -1] / temperature)

    tokens = list(prompt)
    for drawn in jax.random.split(key, count):
        tokens.append(int(draw(np.array(tokens[-model.context :]), drawn)))
    return tokens[len(prompt) :]
