"""The axes a user passes: they override the rules, are matched by path, and are checked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fisher_optax.matrices.axes import MatrixAxes
from fisher_optax.matrices.rules import label_params, resolve_axes
from tests.matrices.axes_models import (
    Experts,
    X,
    by_path,
    leaf,
    nnx_params,
    params_of,
)

FUSED = {"qkv": {"kernel": leaf(12, 3, 3, 4)}, "lm_head": {"kernel": leaf(12, 11)}, "gain": leaf(12)}
FUSED_AXES = {"qkv": {"kernel": MatrixAxes(0, (-2, -1), 1)}, "lm_head": {"kernel": MatrixAxes()}, "gain": None}


@pytest.mark.parametrize("axes", [FUSED_AXES, lambda params: FUSED_AXES], ids=["tree", "function"])
def test_the_users_word_overrides_the_rules(axes: Any) -> None:
    """Also for a head, and a leaf of None goes to the fallback."""
    assert by_path(FUSED)["qkv/kernel"].axes is None
    read = by_path(FUSED, axes)
    assert read["qkv/kernel"].axes == MatrixAxes((0,), (2, 3), (1,))
    assert [x.kind for x in read.values()] == ["other", "matrix", "matrix"]
    assert label_params(FUSED, axes) == {"qkv": {"kernel": "matrix"}, "lm_head": {"kernel": "matrix"}, "gain": "other"}
    without = FUSED_AXES | {"lm_head": {"kernel": None}}
    assert by_path(FUSED, without)["lm_head/kernel"][3:] == (None, "other", "user: fallback", None)


def test_the_users_axes_keep_their_order() -> None:
    assert by_path({"w": leaf(2, 3, 4)}, {"w": MatrixAxes((-1, 0), 1)})["w"].axes == MatrixAxes((2, 0), (1,))


def test_the_users_axes_do_not_make_matrices_of_what_cannot_be() -> None:
    assert by_path({"w": leaf(2, 0)}, {"w": MatrixAxes()})["w"][3:6] == (None, "other", "empty")


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, bool], ids=str)
def test_the_users_axes_are_refused_where_the_dtype_does_not_fit(dtype: Any) -> None:
    """Not ignored: the fallback is another step than the one that was asked for."""
    params = {"w": leaf(2, 3, dtype=dtype)}
    with pytest.raises(ValueError, match=f"'w', which is {jnp.dtype(dtype)}; wanted is floating point, real"):
        resolve_axes(params, {"w": MatrixAxes()})
    assert resolve_axes(params, {"w": None})[0].axes is None


def test_complex_matrices_are_matrices_where_a_method_takes_them() -> None:
    params, axes = {"w": leaf(2, 3, dtype=jnp.complex64)}, {"w": MatrixAxes()}
    assert [x.axes for x in resolve_axes(params, axes, jnp.inexact)] == [MatrixAxes()]
    assert [x.kind for x in resolve_axes(params, None, jnp.inexact)] == ["other"]
    assert label_params(params, axes) == {"w": "matrix"}


def test_a_bias_of_another_kind_of_number_is_left_alone() -> None:
    """A real matrix and a complex bias cannot be one matrix."""
    read = by_path({"kernel": leaf(2, 3), "bias": leaf(3, dtype=jnp.complex64)})
    assert (read["kernel"].axes, read["kernel"].bias) == (MatrixAxes(), None)


def test_the_users_axes_are_matched_by_path_under_a_mask() -> None:
    """`optax.masked` and `optax.partition` hide leaves: the axes of the whole tree still fit what is left."""
    seen = []

    def init(params: Any) -> optax.EmptyState:
        seen.append(by_path(params, FUSED_AXES))
        return optax.EmptyState()

    spy = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    optax.partition({"matrix": spy, "other": spy}, label_params(FUSED, FUSED_AXES)).init(FUSED)
    assert [list(read) for read in seen] == [["lm_head/kernel", "qkv/kernel"], ["gain"]]
    assert seen[0]["qkv/kernel"].axes == MatrixAxes((0,), (2, 3), (1,))
    assert resolve_axes(jax.tree.map(lambda _: optax.MaskedNode(), FUSED), FUSED_AXES) == []


def test_the_users_axes_fit_nnx_states() -> None:
    """A map over the state and a plain dictionary of the same paths say the same."""
    state = nnx_params(lambda rngs: nnx.Linear(5, 7, use_bias=False, rngs=rngs))
    for axes in (jax.tree.map(lambda _: MatrixAxes(1, 0), state), {"kernel": MatrixAxes(1, 0)}):
        assert by_path(state, axes)["kernel"].axes == MatrixAxes((1,), (0,))


def test_resolved_axes_are_axes_to_pass() -> None:
    """What the rules find, given back by path, is found again with a mask in place."""
    params = params_of(Experts(), X)
    axes = jax.tree.structure(params).unflatten([x.axes for x in resolve_axes(params)])
    assert [x.axes for x in resolve_axes(params, axes)] == [x.axes for x in resolve_axes(params)]
    del params["experts"]["Dense_0"]["bias"], params["LayerNorm_0"]
    assert by_path(params, axes)["experts/Dense_0/kernel"].axes == MatrixAxes(1, 2, 0)


@pytest.mark.parametrize(
    ("axes", "error", "match"),
    [
        ({"a": {"kernel": None}}, ValueError, r"no entry for 'b' \(1 of 2 .* it has 'a/kernel'\).*MatrixAxes, or None"),
        ({"a": {"kernle": None}, "b": None}, ValueError, r"no entry for 'a/kernel' .* it has 'a/kernle', 'b'"),
        ({}, ValueError, r"no entry for 'a/kernel' \(2 of 2 .* it has no entries"),
        (MatrixAxes(), ValueError, r"no entry for 'a/kernel' \(2 of 2"),
        ({"a": {"kernel": (0, 1)}, "b": None}, TypeError, r"axes= at 'a/kernel/0' is 0; wanted fo.MatrixAxes or None"),
        ({"a": {"kernel": MatrixAxes(0, 2)}, "b": None}, ValueError, r"'a/kernel': .*outputs=\(2,\).* shape \(5, 7\)"),
        ({"a": {"kernel": MatrixAxes(0, 1, 2)}, "b": None}, ValueError, "must name each of its 2 axes exactly once"),
        ({"a": {"kernel": MatrixAxes(0, -2)}, "b": None}, ValueError, "must name each of its 2 axes exactly once"),
        ({"a": {"kernel": MatrixAxes(-3, 1)}, "b": None}, ValueError, "must name each of its 2 axes exactly once"),
        ({"a": {"kernel": MatrixAxes()}, "b": MatrixAxes()}, ValueError, r"axes of 'b': .* shape \(3,\).* 1 axes"),
    ],
    ids=str,
)
def test_axes_that_do_not_fit_the_tree(axes: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        resolve_axes({"a": {"kernel": leaf(5, 7)}, "b": leaf(3)}, axes)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(inputs=()), ValueError, "no inputs or no outputs"),
        (dict(outputs=[]), ValueError, "no inputs or no outputs"),
        (dict(inputs=(0, 0)), ValueError, "names an axis twice"),
        (dict(inputs=1), ValueError, "names an axis twice"),
        (dict(batch=-1, outputs=-1), ValueError, "names an axis twice"),
        (dict(inputs=0.5), TypeError, r"MatrixAxes\(inputs=0.5\): wanted an integer"),
        (dict(outputs="1"), TypeError, r"MatrixAxes\(outputs='1'\): wanted an integer"),
        (dict(batch=None), TypeError, r"MatrixAxes\(batch=None\): wanted an integer"),
    ],
    ids=str,
)
def test_matrix_axes_are_checked_when_made(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        MatrixAxes(**arguments)


def test_matrix_axes_are_a_leaf_and_a_value() -> None:
    """Integers, lists and NumPy integers become tuples, equal axes are equal keys, a tree holds them whole."""
    axes = MatrixAxes([0, np.int64(1)], 2, batch=range(3, 5))
    assert axes == MatrixAxes((0, 1), (2,), (3, 4))
    assert hash(axes) == hash(MatrixAxes((0, 1), (2,), (3, 4)))
    assert jax.tree.leaves({"w": axes}) == [axes]
    assert axes.resolve("w", (2, 3, 4, 5, 6)) == axes
