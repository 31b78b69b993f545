"""Language models in five layouts, in small: their parameters and a loss, which are traced and never run."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import fisher_optax as fo

VOCABULARY, WIDTH, HIDDEN, HEADS, KEYS, HEAD, LAYERS, EXPERTS = 512, 64, 160, 4, 2, 16, 3, 8
TOKENS = jax.ShapeDtypeStruct((2, 8), jnp.int32)


class Layout(NamedTuple):
    """A model as one framework stores it."""

    title: str
    params: Any
    loss: Callable[[Any, jax.Array], jax.Array]


def next_token(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return fo.losses.softmax_cross_entropy(logits[:, :-1], tokens[:, 1:])


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Heads ``(batch, time, heads, features)``; of keys and values there are fewer."""
    k, v = (jnp.repeat(x, HEADS // KEYS, axis=2) for x in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * scale


class MoE(nn.Module):
    """Every token through every expert, as MaxText does without a grouped product."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, init = (EXPERTS, WIDTH, HIDDEN), nn.initializers.lecun_normal()
        gates = jax.nn.softmax(nn.Dense(EXPERTS, use_bias=False, name="gate")(x))
        wi, wo = self.param("wi_0", init, shape), self.param("wo", init, (EXPERTS, HIDDEN, WIDTH))
        h = nn.silu(jnp.einsum("btd,edh->bteh", x, wi))
        return jnp.einsum("bte,bted->btd", gates, jnp.einsum("bteh,ehd->bted", h, wo))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        heads = functools.partial(nn.DenseGeneral, use_bias=False)
        h = nn.RMSNorm(name="pre_self_attention_norm")(x)
        sizes = {"query": (HEADS, HEAD), "key": (KEYS, HEAD), "value": (KEYS, HEAD)}
        x += heads(WIDTH, axis=(-2, -1), name="out")(attend(*(heads(s, name=n)(h) for n, s in sizes.items())))
        return x + MoE(name="MoeBlock_0")(nn.RMSNorm(name="post_self_attention_norm")(x)), None


class MaxText(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH, name="token_embedder")(tokens)
        scan = nn.scan(nn.remat(Decoder), variable_axes={"params": 1}, split_rngs={"params": True}, length=LAYERS)
        x = nn.RMSNorm(name="decoder_norm")(scan(name="layers")(x, None)[0])
        return nn.Dense(VOCABULARY, use_bias=False, name="logits_dense")(x)


def maxtext() -> Layout:
    model = MaxText()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(TOKENS.shape, int))["params"]

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens)
        return next_token(logits, tokens)

    return Layout("as MaxText: layers scanned along axis 1, experts", params, loss)


def zeros(shapes: Any) -> Any:
    """A tree of shapes as a tree of leaves without values."""
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(d, int) for d in x)  # noqa: E731
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=is_shape)


def gemma() -> Layout:
    attention = {
        "q_einsum": {"w": (HEADS, WIDTH, HEAD)},
        "kv_einsum": {"w": (2, KEYS, WIDTH, HEAD)},
        "attn_vec_einsum": {"w": (HEADS, HEAD, WIDTH)},
    }
    mlp = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    layer = {
        "pre_attention_norm": {"scale": (WIDTH,)},
        "attn": attention,
        "pre_ffw_norm": {"scale": (WIDTH,)},
        "mlp": {name: {"kernel": shape} for name, shape in mlp.items()},
    }
    tree = {"embedder": {"input_embedding": (VOCABULARY, WIDTH)}, "final_norm": {"scale": (WIDTH,)}}

    def loss(p: Any, tokens: jax.Array) -> jax.Array:
        table = p["embedder"]["input_embedding"]
        x = table[tokens]
        for w in (p[f"layer_{i}"] for i in range(LAYERS)):
            h, a = norm(x, w["pre_attention_norm"]["scale"]), w["attn"]
            k, v = jnp.einsum("btd,ckdh->cbtkh", h, a["kv_einsum"]["w"])
            o = attend(jnp.einsum("btd,ndh->btnh", h, a["q_einsum"]["w"]), k, v)
            x += jnp.einsum("btnh,nhd->btd", o, a["attn_vec_einsum"]["w"])
            h, m = norm(x, w["pre_ffw_norm"]["scale"]), w["mlp"]
            x += (jax.nn.gelu(h @ m["gate_proj"]["kernel"]) * (h @ m["up_proj"]["kernel"])) @ m["down_proj"]["kernel"]
        return next_token(norm(x, p["final_norm"]["scale"]) @ table.T, tokens)

    return Layout(
        "as tunix's Gemma: einsums, a tied head",
        zeros(tree | {f"layer_{i}": layer for i in range(LAYERS)}),
        loss,
    )


class LlamaLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.input_norm, self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.q_proj, self.o_proj = linear(WIDTH, HEADS * HEAD), linear(HEADS * HEAD, WIDTH)
        self.k_proj, self.v_proj = linear(WIDTH, KEYS * HEAD), linear(WIDTH, KEYS * HEAD)
        self.gate_proj, self.up_proj = linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN)
        self.down_proj = linear(HIDDEN, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.input_norm(x)
        q, k, v = (f(h).reshape(*h.shape[:2], -1, HEAD) for f in (self.q_proj, self.k_proj, self.v_proj))
        x += self.o_proj(attend(q, k, v).reshape(*h.shape[:2], -1))
        h = self.mlp_norm(x)
        return x + self.down_proj(nnx.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List([LlamaLayer(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def llama() -> Layout:
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(nnx.Rngs(0))))
    return Layout(
        "Llama in Flax's nnx: no biases, fewer keys than queries",
        state,
        lambda state, tokens: next_token(nnx.merge(graph, state)(tokens), tokens),
    )


def equinox() -> Layout:
    linear = lambda o, i: {"weight": (o, i), "bias": (o,)}  # noqa: E731
    layer = {
        "attention": {f"{name}_proj": linear(WIDTH, WIDTH) for name in ("query", "key", "value", "output")},
        "norm": {"weight": (WIDTH,), "bias": (WIDTH,)},
        "mlp": {"layers": [linear(HIDDEN, WIDTH), linear(WIDTH, HIDDEN)]},
    }
    tree = {
        "embedding": {"weight": (VOCABULARY, WIDTH)},
        "layers": [layer] * LAYERS,
        "output": linear(VOCABULARY, WIDTH),
    }
    apply = lambda w, x: x @ w["weight"].T + w["bias"]  # noqa: E731

    def loss(p: Any, tokens: jax.Array) -> jax.Array:
        x = p["embedding"]["weight"][tokens]
        for w in p["layers"]:
            a, first, second = w["attention"], *w["mlp"]["layers"]
            q, k, v = (apply(a[f"{n}_proj"], x).reshape(*x.shape[:2], HEADS, -1) for n in ("query", "key", "value"))
            x += apply(a["output_proj"], attend(q, k[:, :, ::2], v[:, :, ::2]).reshape(x.shape))
            h = norm(x, w["norm"]["weight"]) + w["norm"]["bias"]
            x += apply(second, jax.nn.gelu(apply(first, h)))
        return next_token(apply(p["output"], x), tokens)

    return Layout("as Equinox: outputs first, with biases", zeros(tree), loss)


def hugging_face() -> Layout:
    block = {
        "input_layernorm": (WIDTH,),
        "self_attn.q_proj": (HEADS * HEAD, WIDTH),
        "self_attn.k_proj": (KEYS * HEAD, WIDTH),
        "self_attn.v_proj": (KEYS * HEAD, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD),
        "post_attention_layernorm": (WIDTH,),
        "mlp.gate_proj": (HIDDEN, WIDTH),
        "mlp.up_proj": (HIDDEN, WIDTH),
        "mlp.down_proj": (WIDTH, HIDDEN),
    }
    tree = {"model.embed_tokens": (VOCABULARY, WIDTH), "model.norm": (WIDTH,), "lm_head": (VOCABULARY, WIDTH)}
    tree |= {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}

    def loss(p: Any, tokens: jax.Array) -> jax.Array:
        x = p["model.embed_tokens.weight"][tokens]
        for i in range(LAYERS):
            w = {name: p[f"model.layers.{i}.{name}.weight"] for name in block}
            h = norm(x, w["input_layernorm"])
            q, k, v = ((h @ w[f"self_attn.{n}_proj"].T).reshape(*h.shape[:2], -1, HEAD) for n in "qkv")
            x += attend(q, k, v).reshape(*h.shape[:2], -1) @ w["self_attn.o_proj"].T
            h = norm(x, w["post_attention_layernorm"])
            x += (jax.nn.silu(h @ w["mlp.gate_proj"].T) * (h @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
        return next_token(norm(x, p["model.norm.weight"]) @ p["lm_head.weight"].T, tokens)

    return Layout(
        "Llama with the names of a Hugging Face checkpoint, flat",
        zeros({f"{n}.weight": s for n, s in tree.items()}),
        loss,
    )


MODELS = {"maxtext": maxtext, "gemma": gemma, "llama": llama, "equinox": equinox, "hugging_face": hugging_face}
