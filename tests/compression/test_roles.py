"""Which leaf is a table or a head, and which axis its inputs, are read off the program; what stays dense is named."""

import functools
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fisher_optax as fo
from fisher_optax.capture.roles import read_roles
from fisher_optax.matrices.rules import resolve_axes
from tests.comparisons import assert_same_bits
from tests.compression.compression_models import BODY, ENDS, TEXTS, V, language_model, normal

prune = functools.partial(fo.compression.prune, progress=False)
D = 8
X = jax.random.normal(jax.random.key(1), (20, D))


@pytest.mark.parametrize("name", ENDS)
def test_tables_and_heads_are_what_the_program_makes_of_them(name: str) -> None:
    more, end, heads = ENDS[name]
    params = BODY | more
    roles = {role.path: role for role in read_roles(language_model(end), params, TEXTS)}
    assert {path for path, role in roles.items() if role.kind == "embedding"} == {"table", "places"}
    assert {path: role.tokens for path, role in roles.items() if role.kind == "head"} == heads
    assert (roles["table"].by_data, roles["places"].by_data) == (True, False)
    assert (roles["table"].tokens, roles["hidden"].kind, roles["up"].kind) == (0, "matrix", "matrix")
    pruned, masks, report = prune(language_model(end), params, [TEXTS], "wanda", "2:4")
    layers = ["hidden", "up", "down"]
    assert [layer.name for layer in report.layers] == layers
    assert all((np.asarray(masks[k]).reshape(len(masks[k]), -1, 4).sum(-1) == 2).all() for k in layers)
    assert_same_bits(*({k: tree[k] for k in params if k not in layers} for tree in (pruned, params)))
    assert {leaf.name: leaf.reason for leaf in report.left} == {
        **dict.fromkeys(("table", "places"), "embedding"),
        **dict.fromkeys(heads, "head"),
    }


def hidden(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["hidden"]) @ p["out"]


half = lambda x: x.astype(jnp.bfloat16)  # noqa: E731
LOOKUPS = {
    "take": lambda p, t: hidden(p, jnp.take(p["table"], t, axis=0)),
    "get": lambda p, t: hidden(p, p["table"].at[t].get(mode="fill", fill_value=0)),
    "cast": lambda p, t: hidden(p, half(p["table"])[t].astype(jnp.float32)),
    "one hot": lambda p, t: hidden(p, jax.nn.one_hot(t, V) @ p["table"]),
    "equal to iota": lambda p, t: hidden(p, half(t[..., None] == jnp.arange(V)) @ p["table"]),
    "under jit": lambda p, t: jax.jit(lambda p, t: hidden(p, p["table"][t]))(p, t),
    "by example": lambda p, t: jax.vmap(lambda t: hidden(p, p["table"][t]))(t),
    "by token": lambda p, t: jax.vmap(jax.vmap(lambda t: hidden(p, p["table"][t])))(t),
    "with a mask": lambda p, t: jnp.where(t[..., None] > 2, hidden(p, p["table"][t]), -1e9),
    "with another output": lambda p, t: (hidden(p, p["table"][t]), p["table"][t] @ p["hidden"]),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_a_table_is_what_is_looked_up_in_whatever_way(name: str) -> None:
    params = {"table": normal(2, V, D), "hidden": normal(3, D, D), "out": normal(4, D, V)}
    roles = {role.path: role for role in read_roles(LOOKUPS[name], params, TEXTS)}
    assert {path: role.kind for path, role in roles.items()} == {
        "table": "embedding",
        "hidden": "matrix",
        "out": "head",
    }
    assert (roles["table"].tokens, roles["table"].by_data, roles["out"].tokens) == (0, True, 1)
    assert roles["table"].units == fo.MatrixAxes(1, 0)


def test_a_comparison_of_floats_is_no_lookup_and_stacked_tables_stay_apart() -> None:
    def compare(p: Any, x: Any) -> Any:
        return (x == 0).astype(jnp.float32) @ p["hidden"]

    (role,) = read_roles(compare, {"hidden": normal(3, D, D)}, X)
    assert role.kind == "matrix"

    scan = lambda p, t: jax.lax.scan(lambda h, table: (h + table[t], None), jnp.zeros((6, 5, D)), p["tables"])[0]  # noqa: E731
    (role,) = read_roles(scan, {"tables": normal(2, 3, V, D)}, TEXTS)
    assert (role.kind, role.units) == ("embedding", fo.MatrixAxes(2, 1, 0))


def test_a_last_matrix_of_a_model_without_tokens_is_a_layer() -> None:
    """Nor is one a head whose result goes on to another product, or is added to the model's stream."""
    params = {"first": normal(2, D, D), "last": normal(3, D, V)}
    report = prune(lambda p, x: jnp.tanh(x @ p["first"]) @ p["last"], params, [X], "wanda").report
    assert [layer.name for layer in report.layers] == ["first", "last"]
    stream = {"table": normal(4, V, D), "up": normal(5, D, V), "down": normal(6, V, D)}

    def encoder(p: Any, tokens: Any) -> Any:
        x = p["table"][tokens]
        return x + jax.nn.relu(x @ p["up"]) @ p["down"]

    kinds = {role.path: role.kind for role in read_roles(encoder, stream, TEXTS)}
    assert kinds == {"table": "embedding", "up": "matrix", "down": "matrix"}


def test_names_with_dots_say_what_nested_ones_say() -> None:
    layer = {"weight": normal(1, 4, 6), "bias": X[0, :6]}
    nested: Any = {"lm_head": {"weight": normal(0, 4, 3)}, "h": {"0": {"c_fc": layer}}}
    dotted = {"lm_head.weight": nested["lm_head"]["weight"]}
    dotted |= {f"h.0.c_fc.{name}": x for name, x in layer.items()}
    wanted = {leaf.path.replace("/", "."): leaf for leaf in resolve_axes(nested)}
    found = resolve_axes(dotted)
    assert [leaf.path for leaf in found] == sorted(dotted)
    for leaf in found:
        other = wanted[leaf.path]
        assert leaf[1:-1] == other[1:-1]
        assert leaf.bias == (other.bias and other.bias.replace("/", "."))
    both = {"a.b": X, "a": {"b": X}}
    assert [leaf.path for leaf in resolve_axes(both)] == ["a/b", "a.b"]


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(8, (3,), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(nn.WeightNorm(nn.Dense(8, name="normed"), name="norm")(x))
        return nn.Dense(3, name="head")(nn.relu(nn.LayerNorm(name="ln")(nn.Dense(8, name="plain")(x))))


def test_what_stays_dense_is_named_and_counted() -> None:
    params = Grouped().init(jax.random.key(2), X[None])
    with pytest.warns(
        UserWarning, match=r"prune: 50% of the weights of all matrices stay dense.*'params/depthwise/"
    ) as w:
        report = prune(Grouped().apply, params, [X[None]], "magnitude").report
    assert "'params/normed/kernel', not multiplied as it is" in str(w[0].message)
    assert {leaf.name: (leaf.size, leaf.is_meant) for leaf in report.left} == {
        "params/depthwise/kernel": (24, False),
        "params/normed/kernel": (64, False),
        "params/head/kernel": (24, True),
    }
    assert (report.sparsity, report.sparsity_of_all) == (0.5, 32 / 176)
    assert "18.18% of their weights are gone" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = prune(Grouped().apply, params, [X[None]], "magnitude", layers="*/head").report
    assert "left out by layers=" in str(named)
    with pytest.raises(ValueError, match="'params/depthwise/kernel' is used in a convolution in groups"):
        prune(Grouped().apply, params, [X[None]], layers="*/depthwise")


EXPERTS = {"up": normal(2, 4, D, 6), "down": normal(3, 4, 6, D)}


def experts(p: Any, x: Any) -> Any:
    """Two of four experts get all tokens."""
    gates = jax.nn.one_hot(jnp.arange(len(x)) % 2 + 1, 4)
    h = jax.nn.relu(jnp.einsum("ebd,edf->ebf", jnp.einsum("be,bd->ebd", gates, x), p["up"]))
    return jnp.stack([h[e] @ p["down"][e] for e in range(4)])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_that_no_token_reached_are_named_and_go_by_size(method: str) -> None:
    with pytest.warns(UserWarning, match=r"'up': no input has reached \[0\], \[3\]; 'down\[0\]': no .* it"):
        pruned, masks, report = prune(experts, EXPERTS, [X], method)
    by_size = prune(experts, EXPERTS, [X], "magnitude", scope="output").masks
    for name in EXPERTS:
        for e in (0, 3):
            assert_same_bits(masks[name][e], by_size[name][e])
            assert_same_bits(pruned[name][e], jnp.where(masks[name][e], EXPERTS[name][e], 0))
    assert "no input has reached [0], [3]" in str(report)
    assert report.sparsity == 0.5


def test_places_of_a_stack_without_use_and_uses_without_known_inputs_are_named() -> None:
    params = {"stack": normal(2, 3, D, D), "both": normal(3, D, D)}

    def apply(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["stack"][0]) @ p["stack"][2] @ p["both"] + jnp.sum(jnp.square(p["both"]))

    with pytest.warns(UserWarning, match="prune: ") as found:
        report = prune(apply, params, [X], "wanda").report
    assert ["'stack[1]', not used by the program" in str(found[0].message), len(found)] == [True, 2]
    assert "weights of 1 layers do: 'both': also used by square" in str(found[1].message)
    assert [layer.note for layer in report.layers] == ["", "", "also used by square"]
    assert report.sparsity_of_all == 96 / 256
    with pytest.warns(UserWarning, match="'both': also used"):
        prune(apply, params, [X], "wanda", layers=["stack", "both"])


class Counting(nnx.Module):
    def __init__(self, rngs: Any):
        self.embed, self.drop = nnx.Embed(V, D, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        self.up, self.norm = nnx.Linear(D, D, rngs=rngs), nnx.BatchNorm(D, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        return self.embed.attend(self.norm(self.drop(jax.nn.relu(self.up(self.embed(tokens))))))


def test_counters_and_random_states_pass_through() -> None:
    """A whole state is pruned as its parameters are."""
    model = Counting(nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)
    _, params, rest = nnx.split(model, nnx.Param, ...)
    apply = lambda state, tokens: nnx.merge(graph, state)(tokens)  # noqa: E731
    of_params = lambda p, tokens: nnx.merge(graph, p, rest)(tokens)  # noqa: E731
    whole, masks, report = prune(apply, state, [TEXTS], "sparsegpt", "2:4")
    assert jax.tree.structure(whole) == jax.tree.structure(state)
    assert [layer.name for layer in report.layers] == ["up/kernel"]
    alone = prune(of_params, params, [TEXTS], "sparsegpt", "2:4")
    assert_same_bits(whole["up"], alone.params["up"])
    key, count = (lambda s: s["drop"]["rngs"]["key"][...]), (lambda s: s["drop"]["rngs"]["count"][...])
    assert (key(whole), count(whole)) == (key(state), count(state))
    assert len(jax.tree.leaves(masks)) == 1
    assert fo.compression.owl(apply, state, [TEXTS], 0.5, progress=False) == {"up/kernel": 0.5}
    F = jax.tree.map(lambda x: jnp.square(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    by_fisher = prune(apply, state, [TEXTS], "fisher", 0.5, fisher=F).masks
    assert int((~by_fisher["up"]["kernel"][...]).sum()) == 32
