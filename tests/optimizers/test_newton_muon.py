"""Newton-Muon and the sandwich follow their formulas, and have the invariances that these have."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax.statistics import LayerFactors
from tests.reference import newton_muon as reference
from tests.reference.soap_muon import polar

# Enough to be the polar factor to the last digits, of singular values down to a thousandth of the largest.
EXACT = (*fo.polar_express(8), *((1.5, -0.5, 0.0),) * 6)
FORMS = ("newton", "sandwich")
M, N = 8, 5


def gradients(steps: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps, M, N))


def moments(steps: int = 20, seed: int = 1, tokens: int = 24) -> np.ndarray:
    X = np.random.default_rng(seed).normal(size=(steps, tokens, M)) * np.geomspace(1, 0.1, M)
    return X.transpose(0, 2, 1) @ X / tokens


def make(form: str, **options: Any) -> Any:
    return fo.scale_by_newton_muon(form=form, scale=1.0, polynomial=EXACT, **options)


def directions(tx: Any, Gs: Any, As: Any, weights: Any = None) -> list[np.ndarray]:
    """Of one matrix; where A is None, there are no statistics."""
    params: Any = {"dense": {"kernel": jnp.zeros(np.shape(Gs)[1:], Gs[0].dtype)}}
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for t, (G, A) in enumerate(zip(Gs, As, strict=True)):
        weight = jnp.asarray(24.0 if weights is None else weights[t])
        statistics = None if A is None else {"dense": {"kernel": LayerFactors(jnp.asarray(A), None, None, weight)}}
        updates, state = update({"dense": {"kernel": jnp.asarray(G)}}, state, params, statistics=statistics)
        out.append(np.asarray(updates["dense"]["kernel"]))
    return out


@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_are_the_formulas(form: str) -> None:
    """With other numbers of tokens, some calls without statistics, and roots of every third call."""
    with jax.enable_x64():
        Gs, As, weights = gradients(), [*moments()], np.random.default_rng(2).integers(1, 50, 20).astype(float)
        for t in (4, 8, 9, 15):
            As[t] = None
        options: Any = {"beta": 0.9, "damping": 0.1}
        tx = make(form, curvature_decay=0.8, precondition_frequency=3, **options)
        wanted = reference.directions(Gs, As, weights, form, decay=0.8, every=3, **options)
        for got, w in zip(directions(tx, Gs, As, weights), wanted, strict=True):
            np.testing.assert_allclose(got, w, atol=1e-9)


@pytest.mark.parametrize(("form", "damping"), [("newton", 0.2), ("sandwich", 1e-3)])
def test_defaults_are_the_authors(form: str, damping: float) -> None:
    with jax.enable_x64():
        Gs, As = gradients(6), moments(6)
        wanted = reference.directions(Gs, As, [1.0] * 6, form, damping=damping, every=32)
        for got, w in zip(directions(make(form), Gs, As), wanted, strict=True):
            np.testing.assert_allclose(got, w, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_white_inputs_and_none_yet_give_muon(form: str) -> None:
    with jax.enable_x64():
        Gs = gradients(4)
        muon = fo.scale_by_muon(scale=1.0, polynomial=EXACT)
        params: Any = {"dense": {"kernel": jnp.zeros((M, N))}}
        state, wanted = muon.init(params), []
        for G in Gs:
            updates, state = muon.update({"dense": {"kernel": jnp.asarray(G)}}, state, params)
            wanted.append(updates["dense"]["kernel"])
        white, none = [3e-3 * np.eye(M)] * 4, [None] * 4
        np.testing.assert_allclose(directions(make(form), Gs, white), wanted, atol=1e-9)
        np.testing.assert_allclose(directions(make(form), Gs, none), wanted, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_inputs_unit_and_an_orthogonal_change_of_them_do_not_matter(form: str) -> None:
    with jax.enable_x64():
        Gs, As = gradients(5), moments(5)
        plain = np.stack(directions(make(form, precondition_frequency=2), Gs, As))
        P = np.linalg.qr(np.random.default_rng(3).normal(size=(M, M)))[0]
        turned = directions(make(form, precondition_frequency=2), P.T @ Gs, P.T @ As @ P)
        np.testing.assert_allclose(turned, P.T @ plain, atol=1e-9)
        np.testing.assert_allclose(directions(make(form, precondition_frequency=2), Gs, 1e4 * As), plain, atol=1e-8)


def test_only_the_sandwich_knows_no_basis_of_its_inputs() -> None:
    """``x → x T``: A is then ``Tᵀ A T``, G is ``Tᵀ G``, and a step that changes no output is ``T⁻¹ U``."""
    with jax.enable_x64():
        Gs, As = gradients(5), moments(5)
        T = np.random.default_rng(4).normal(size=(M, M)) + 2 * np.eye(M)
        for form, same in (("sandwich", True), ("newton", False)):
            tx = make(form, damping=0.0, precondition_frequency=2)
            plain = np.stack(directions(tx, Gs, As))
            changed = T @ np.stack(directions(tx, T.T @ Gs, T.T @ As @ T))
            # |D| is of weights, which have another size in another basis: each step up to its length.
            error = [
                np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b))
                for a, b in zip(plain, changed, strict=True)
            ]
            assert max(error) < 1e-8 if same else min(error) > 0.1, (form, error)


def test_a_gradient_that_the_inputs_made_is_undone() -> None:
    """``newton(A, A O) = O``."""
    with jax.enable_x64():
        A, O = moments(1)[0], np.linalg.qr(np.random.default_rng(5).normal(size=(M, N)))[0]
        np.testing.assert_allclose(directions(make("newton", damping=0.0), [A @ O], [A])[0], O, atol=1e-9)


def test_the_sandwich_descends_along_any_gradient() -> None:
    with jax.enable_x64():
        Gs, As = gradients(20, seed=6), moments(20, seed=7)
        tx = make("sandwich", beta=0.0, precondition_frequency=1)
        assert all(np.sum(G * U) > 0 for G, U in zip(Gs, directions(tx, Gs, As), strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_fewer_tokens_than_inputs_make_finite_steps(form: str) -> None:
    Gs, As = gradients(3).astype(np.float32), moments(3, tokens=2).astype(np.float32)
    out = directions(make(form), Gs, As)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(np.linalg.norm(out, axis=(1, 2)), N**0.5, rtol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_of_zeros_makes_no_step(form: str) -> None:
    for U in directions(make(form), np.zeros((3, M, N), np.float32), moments(3).astype(np.float32)):
        np.testing.assert_array_equal(U, 0)


@pytest.mark.parametrize("form", FORMS)
def test_an_expert_without_tokens_keeps_its_moment(form: str) -> None:
    """Each expert has an A of its own; one that gets nothing goes on from where it was."""
    with jax.enable_x64():
        Gs, As = gradients(6), moments(6)
        late = np.zeros_like(As)
        late[[0, 1, 4, 5]] = As[[0, 1, 4, 5]]
        params: Any = {"experts": {"kernel": jnp.zeros((2, M, N))}}
        axes = {"experts": {"kernel": fo.MatrixAxes(1, 2, 0)}}
        tx = make(form, precondition_frequency=1, axes=axes)
        state, update = tx.init(params), jax.jit(tx.update)
        of_late = [A if A.any() else None for A in late]
        alone = [directions(make(form, precondition_frequency=1), Gs, own) for own in ([*As], of_late)]
        for t, G in enumerate(Gs):
            weight = jnp.asarray([24.0, 24.0 * late[t].any()])
            left = jnp.asarray(np.stack([As[t], late[t]]))
            statistics = {"experts": {"kernel": LayerFactors(left, None, None, weight)}}
            updates, state = update({"experts": {"kernel": jnp.asarray([G, G])}}, state, params, statistics=statistics)
            for got, wanted in zip(updates["experts"]["kernel"], (alone[0][t], alone[1][t]), strict=True):
                np.testing.assert_allclose(got, wanted, atol=1e-9)


def captured(params: Any, kind: Any) -> Any:
    x, y = (jnp.asarray(np.random.default_rng(s).normal(size=(16, d)), jnp.float32) for s, d in ((0, 4), (1, 3)))

    def loss(params: Any) -> jax.Array:
        return fo.losses.gaussian(x @ params["dense"]["kernel"] + params["dense"]["bias"], y)

    return fo.value_and_grad(loss, kind)(params)[1:]


def test_both_kinds_of_statistics_give_the_same_and_biases_go_to_the_fallback() -> None:
    params: Any = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    tx, out = fo.newton_muon(0.1), []
    for kind in (fo.InputGram(), fo.KroneckerFactors()):
        grads, stats = captured(params, kind)
        out.append(tx.update(grads, tx.init(params), params, statistics=stats)[0]["dense"])
    np.testing.assert_allclose(out[0]["kernel"], out[1]["kernel"], atol=1e-6)
    adam = optax.adamw(0.1, weight_decay=0.0)
    bias = {"bias": grads["dense"]["bias"]}
    wanted = adam.update(bias, adam.init(bias), bias)[0]
    np.testing.assert_allclose(out[0]["bias"], wanted["bias"], rtol=1e-5)


def test_a_matrix_with_too_many_inputs_gets_muons_step() -> None:
    with jax.enable_x64():
        Gs, As = gradients(3), moments(3)
        got = directions(make("newton", max_precond_dim=M - 1, beta=0.0), Gs, As)
        np.testing.assert_allclose(got, [polar(G) for G in Gs], atol=1e-9)


def test_a_step_with_statistics_that_are_not_finite_changes_nothing() -> None:
    Gs, As = gradients(2).astype(np.float32), moments(2).astype(np.float32)
    params: Any = {"dense": {"kernel": jnp.zeros((M, N))}}
    tx = fo.newton_muon(0.1, weight_decay=0.1)
    state = tx.init(params)
    bad = {"dense": {"kernel": LayerFactors(jnp.asarray(As[0]).at[0, 0].set(jnp.nan), None, None, jnp.asarray(1.0))}}
    updates, new = tx.update({"dense": {"kernel": jnp.asarray(Gs[0])}}, state, params, statistics=bad)
    np.testing.assert_array_equal(updates["dense"]["kernel"], 0)
    old = jax.tree.leaves(state)
    assert sum(not np.array_equal(a, b) for a, b in zip(old, jax.tree.leaves(new), strict=True)) <= 2  # the counters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "both"}, "form must be"),
        ({"damping": -1.0}, "damping must be at least 0"),
        ({"curvature_decay": 1.0}, "curvature_decay must be at least 0"),
        ({"refresh": "adaptive"}, "needs an eigenbasis"),
        ({"refresh": fo.Refresh(first_step="skip")}, "takes no first_step"),
        ({"storage": fo.Storage(block_size=2)}, "takes no block_size"),
        ({"scale": "adam"}, "scale must be a number or one of"),
    ],
)
def test_bad_arguments_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fo.newton_muon(0.1, **options)


def test_missing_statistics_are_asked_for_by_name() -> None:
    params: Any = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    tx = fo.newton_muon(0.1)
    with pytest.raises(TypeError, match="InputGram"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="no statistics for 'dense/kernel'"):
        tx.update(params, tx.init(params), params, statistics={"dense": {"kernel": None}})
    wrong = {"dense": {"kernel": LayerFactors(jnp.eye(3), None, None, jnp.asarray(1.0))}}
    with pytest.raises(ValueError, match="wanted a 4 x 4 matrix"):
        tx.update(params, tx.init(params), params, statistics=wrong)
