"""Fewer tokens: the loss changes by exactly what is predicted, ids are mapped, and nothing is guessed."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_optax as fo
from experiments.models.gpt import GPT
from fisher_optax.compression import removal_bias, removal_loss_change, remove_tokens, tokens_to_remove
from tests.compression.compression_models import BODY, ENDS, TEXTS, language_model

V, GONE = 11, [0, 4, 10, 4]
KEPT = [1, 2, 3, 5, 6, 7, 8, 9]


class Classifier(nn.Module):
    """Bag of tokens, a head with a bias."""

    vocabulary: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, 6)(tokens)
        return nn.Dense(self.vocabulary, name="head", bias_init=nn.initializers.normal(1.0))(nn.gelu(x))


def gpt(tied: bool) -> Callable[[int], GPT]:
    return lambda vocabulary: GPT(vocabulary, context=5, layers=1, width=6, heads=2, tied=tied)


MODELS = {"tied": gpt(True), "own head": gpt(False), "head with a bias": Classifier}
SLICED = {
    "tied": {"embed/embedding"},
    "own head": {"embed/embedding", "head/kernel"},
    "head with a bias": {"Embed_0/embedding", "head/kernel", "head/bias"},
}


def cross_entropy(z: Any, y: Any, w: Any) -> float:
    z = np.asarray(z, np.float64)
    losses = np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, np.asarray(y)[..., None], -1)[..., 0]
    return float((w * losses).sum() / w.sum())


@pytest.mark.parametrize("name", MODELS)
def test_removal_changes_the_loss_by_what_is_predicted(name: str, x64: None) -> None:
    """On texts without removed tokens, sliced or with a bias of the logits, with weights. A GPT's logits are float32
    always.
    """
    del x64
    rng, make, error = np.random.default_rng(0), MODELS[name], 1e-12 if name == "head with a bias" else 1e-6
    x, y = rng.choice(KEPT, (2, 3, 5))
    w = rng.uniform(size=(3, 5))
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape))  # noqa: E731
    params = jax.tree.map(draw, jax.eval_shape(make(V).init, jax.random.key(0), x)["params"])
    before = jax.tree.map(np.array, params)
    trimmed = remove_tokens(params, GONE, vocabulary=V if name == "tied" else None)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    shapes = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(trimmed.params), strict=True)
    changed = {jax.tree_util.keystr(p, simple=True, separator="/") for (p, a), b in shapes if a.shape != b.shape}
    assert changed == SLICED[name]
    np.testing.assert_array_equal(trimmed.kept, KEPT)
    np.testing.assert_array_equal(trimmed.id_map[trimmed.kept], np.arange(8))
    assert list(np.flatnonzero(np.asarray(trimmed.id_map) < 0)) == [0, 4, 10]

    logits = jax.jit(make(V).apply)({"params": params}, x)
    new = jax.jit(make(8).apply)({"params": trimmed.params}, trimmed.encode(x))
    change = cross_entropy(new, trimmed.encode(y), w) - cross_entropy(logits, y, w)
    predicted = removal_loss_change(jnp.asarray(logits), y, GONE, w)
    assert change < -0.01
    np.testing.assert_allclose(predicted, change, rtol=0, atol=error)
    biased = logits + removal_bias(GONE, V)
    np.testing.assert_allclose(np.asarray(biased)[..., KEPT], new, rtol=0, atol=error)
    np.testing.assert_allclose(
        cross_entropy(biased, y, w), cross_entropy(new, trimmed.encode(y), w), rtol=0, atol=error
    )


def test_changes_far_from_one_are_exact_in_float32() -> None:
    """log(1 - p) for p of 1e-12 and of 1 - 1e-12: neither is lost. Positions of weight 0 may be anything."""
    z = np.array([[0.0, -27.6], [0.0, 27.6], [np.nan, 0.0]], np.float32)
    change = jax.jit(removal_loss_change, static_argnums=2)
    one = np.eye(3, dtype=np.float32)
    for w, wanted in ((one[0], -np.log1p(np.exp(-27.6))), (one[1], -np.logaddexp(0, 27.6))):
        np.testing.assert_allclose(change(z, np.array([0, 0, 1]), (1,), w), wanted, rtol=1e-5)
    assert float(change(z, np.array([0, 1, 1]), (1,), one[1])) == np.inf
    half = jax.eval_shape(lambda z: removal_loss_change(z, jnp.zeros(3, int), []), jnp.asarray(z, jnp.bfloat16))
    assert half.dtype == jnp.float32


def test_leaves_by_name_and_under_jit() -> None:
    params = {"table": jnp.arange(12.0).reshape(4, 3), "out": {"w": jnp.ones((4, 4)), "b": jnp.arange(4.0)}}
    trim = jax.jit(lambda p: remove_tokens(p, np.array([1]), leaves={"table": 0, "out/w": -1, "out/b": 0}))
    trimmed = trim(params)
    np.testing.assert_array_equal(trimmed.params["table"], params["table"][jnp.array([0, 2, 3])])
    assert trimmed.params["out"]["w"].shape == (4, 3)
    np.testing.assert_array_equal(trimmed.params["out"]["b"], [0.0, 2.0, 3.0])
    np.testing.assert_array_equal(jax.jit(lambda t, x: t.encode(x))(trimmed, jnp.array([3, 1, -1, 9])), [2, -1, -1, -1])
    whole = remove_tokens(params, [], leaves={"table": 0})
    np.testing.assert_array_equal(whole.id_map, np.arange(4))


def shaped(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """embed__embedding=(2, 3) as nested dictionaries of zeros."""
    out: dict[str, Any] = {}
    for name, shape in shapes.items():
        module, leaf = name.split("__")
        out.setdefault(module, {})[leaf] = jnp.zeros(shape)
    return out


EMBED, HEAD = dict(embed__embedding=(7, 3)), dict(head__kernel=(3, 7), head__bias=(7,))


@pytest.mark.parametrize(
    ("shapes", "how", "message"),
    (
        (EMBED | dict(position__embedding=(5, 3)), {}, r"which length.*Pass vocabulary="),
        (EMBED | dict(position__embedding=(7, 3)), {}, r"'embed/embedding' and 'position/embedding' both.*leaves="),
        (dict(embed__embedding=(7, 7)), {}, r"'embed/embedding' has two axes of 7, \(7, 7\).*leaves="),
        (EMBED | HEAD | dict(mlp__kernel=(3, 7)), {}, r"'mlp/kernel' \(3, 7\) has an axis of 7 too.*leaves="),
        (dict(mlp__kernel=(3, 7)), {}, r"no head and no embedding.*vocabulary="),
        (EMBED | dict(head__kernel=(3, 8)), {}, r"which length.*'embed/embedding' \(7, 3\), 'head/kernel' \(3, 8\)"),
        (EMBED | dict(head__kernel=(3, 8)), {"vocabulary": 7}, r"7 tokens do not fit 'head/kernel'.*padded"),
        (EMBED | dict(head__kernel=(3, 8)), {"vocabulary": 8}, r"8 tokens do not fit 'embed/embedding'"),
        (EMBED | dict(head__kernel=(7, 2)), {"vocabulary": 7}, r"7 tokens do not fit 'head/kernel'"),
        (EMBED | dict(lm_head__w1=(7, 3)), {}, r"which length.*'lm_head/w1' \(7, 3\).*vocabulary=.*apply_fn="),
        (dict(lm_head__w1=(7, 3)), {}, r"which length.*'lm_head/w1' \(7, 3\).*apply_fn= and batch="),
        (EMBED, {"vocabulary": 9}, r"no embedding or head has an axis of 9.*leaves="),
        (EMBED, {"leaves": {"embed": 0}}, r"no leaf 'embed'; there are 'embed/embedding'"),
        (EMBED, {"leaves": {"embed/embedding": 2}}, r"is \(7, 3\) and has no axis 2"),
        (EMBED | HEAD, {"leaves": {"embed/embedding": 0, "head/kernel": 0}}, r"'head/kernel': 3.*wanted 7 tokens"),
        (EMBED, {"leaves": {}}, r"leaves= is empty"),
        (EMBED, {"ids": [7, -1]}, r"ids lie between 0 and 6; got ids 7, -1"),
        (EMBED, {"ids": range(7)}, r"ids are all 7 tokens"),
        (EMBED, {"ids": [0.5]}, r"ids must be integers; got float64"),
    ),
)
def test_what_is_not_clear_is_an_error(shapes: dict[str, Any], how: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        remove_tokens(shaped(**shapes), **{"ids": [1], **how})


@pytest.mark.parametrize("name", ENDS)
def test_the_program_shows_the_vocabulary_whatever_names_and_layouts_are(name: str) -> None:
    """Though places and hidden units are as many; what is no parameter passes through."""
    more, end, heads = ENDS[name]
    apply_fn, params = language_model(end), BODY | more | {"steps": jnp.arange(12), "key": jax.random.key(0)}
    trimmed = remove_tokens(params, [3, 7], apply_fn=apply_fn, batch=TEXTS)
    np.testing.assert_array_equal(trimmed.kept, kept := np.setdiff1d(np.arange(12), [3, 7]))
    sliced = {"table": 0, **heads, **dict.fromkeys({"plus"} & set(more), 0)}
    for path, x in params.items():
        wanted = jnp.take(x, kept, sliced[path]) if path in sliced else x
        assert jnp.array_equal(trimmed.params[path], wanted), path
    tokens = jnp.asarray(kept)[None, :5]
    logits, new = apply_fn(params, tokens)[..., kept], apply_fn(trimmed.params, trimmed.encode(tokens))
    np.testing.assert_allclose(jax.nn.log_softmax(new), jax.nn.log_softmax(logits), atol=1e-5)


def program(table: int, head: int, tables: int = 1, **more: tuple[int, ...]) -> dict[str, Any]:
    """A model that is shown to `remove_tokens`, of so many rows and outputs."""
    params = {"out": (3, head), **{f"table_{i}": (table, 3) for i in range(tables)}, **more}

    def apply(p: Any, tokens: Any) -> Any:
        return sum((p[f"table_{i}"][tokens] for i in range(tables)), jnp.zeros((2, 3))) @ p["out"]

    arrays = {name: jnp.ones(shape) for name, shape in params.items()}
    return dict(params=arrays, apply_fn=apply, batch=jax.ShapeDtypeStruct((2,), jnp.int32))


@pytest.mark.parametrize(
    ("how", "message"),
    (
        (program(9, 12), r"9 tokens do not fit .*in 9 rows of 'table_0'; 12 outputs of 'out' are returned.*leaves="),
        (program(9, 12) | {"vocabulary": 12}, r"12 tokens do not fit all of the program"),
        (program(9, 9, tables=2), r"'table_0' and 'table_1' are tables of 9"),
        (program(9, 9, unused=(9, 2)), r"'unused' \(9, 2\) has an axis of 9 too, .*not understood"),
        (program(9, 9) | {"apply_fn": lambda p, t: jnp.sum(p["out"]) * t}, r"which length.*nothing is looked up"),
    ),
)
def test_a_program_that_does_not_show_one_vocabulary_is_an_error(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        remove_tokens(ids=[1], **how)


def test_a_head_alone_is_shown_by_the_program() -> None:
    assert remove_tokens(ids=[1], **program(9, 7, tables=0)).params["out"].shape == (3, 6)


def test_other_errors_name_what_is_wrong() -> None:
    trimmed = remove_tokens(shaped(**EMBED), [2, 5])
    z = jnp.zeros((2, 7))
    cases = (
        (lambda: trimmed.encode([1, 2, 5, 2]), r"ids 2, 5 occur"),
        (lambda: trimmed.encode([-1, 7]), r"ids -1, 7 occur"),
        (lambda: removal_loss_change(z, jnp.array([1, 2]), [2]), r"labels ids 2 are removed"),
        (lambda: removal_loss_change(z, jnp.array([-100, 1]), [2]), r"labels ids -100 are removed or no"),
        (lambda: removal_loss_change(z, jnp.array([1]), [2]), r"got logits \(2, 7\), labels \(1,\)"),
        (lambda: jax.jit(lambda i: removal_bias(i, 3))(jnp.array([1])), r"ids shape the result"),
        (lambda: tokens_to_remove(jnp.ones(3)), r"give count or threshold"),
        (lambda: tokens_to_remove(jnp.ones(3), 3), r"count lies between 0 and 2"),
        (lambda: tokens_to_remove(jnp.ones((3, 2)), 1), r"wanted one number a token"),
        (lambda: tokens_to_remove(jnp.array([1.0, jnp.nan]), 1), r"not finite"),
    )
    for call, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            call()


def test_the_least_important_go_and_with_a_threshold_only_the_certain_ones() -> None:
    rng = np.random.default_rng(1)
    batches = [(rng.integers(0, 5, 40), rng.integers(0, 5, 40))]
    params = {"embed": {"embedding": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)}, "out": jnp.ones((3, 5))}

    def loss(params: Any, example: Any) -> Any:
        return fo.losses.softmax_cross_entropy(params["embed"]["embedding"][example[0]] @ params["out"], example[1])

    by_token = lambda path, squares: squares.sum(1) if path == "embed/embedding" else None  # noqa: E731
    fisher = fo.fisher.diagonal(loss, params, batches, groups=by_token)
    (mean,), (upper,) = jax.tree.leaves(fisher.mean), jax.tree.leaves(fisher.confidence_interval(0.8)[1])
    order = np.argsort(mean, kind="stable")
    np.testing.assert_array_equal(tokens_to_remove(fisher, 2), order[:2])
    threshold = float(np.sort(upper)[2])
    certain = tokens_to_remove(fisher, threshold=threshold, level=0.8)
    assert set(certain) == set(np.argsort(upper)[:2])
    assert len(certain) < len(tokens_to_remove(mean, threshold=threshold))
