"""A step in which an expert gets no rows changes nothing that is kept of it, against NumPy expert by expert."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from fisher_optax.preconditioner.contracts import MatrixState
from fisher_optax.statistics import LayerFactors
from tests.capture.expert_models import drawn
from tests.grouped import grouped
from tests.reference.kfac import Kfac

pytestmark = pytest.mark.usefixtures("x64")

E, M, N, STEPS = 4, 4, 3, 9
# The last is never reached, the first always; of the others the first steps, or some later ones, are missing.
WITHOUT = [(), (0, 1, 4), (3, 5, 6), tuple(range(STEPS))]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def rows(e: int, t: int) -> tuple[np.ndarray, np.ndarray] | None:
    """What expert e sees at step t, and the gradients there: 7 rows, or none."""
    rng = np.random.default_rng((e, t))
    return None if t in WITHOUT[e] else (rng.normal(size=(7, M)), rng.normal(size=(7, N)))


def statistics(t: int, bases: Any = None) -> tuple[jax.Array, LayerFactors]:
    """The gradient of all experts, and their statistics, zeros where there are no rows."""
    each = [rows(e, t) or (np.zeros((7, M)), np.zeros((7, N))) for e in range(E)]
    X, D = (jnp.asarray(np.stack(some)) for some in zip(*each, strict=True))
    squares = None if bases is None else jnp.einsum("erm,ern->emn", (X @ bases[0]) ** 2, (D @ bases[1]) ** 2) / 7
    weight = jnp.asarray([0.0 if rows(e, t) is None else 7.0 for e in range(E)])
    left, right = X.mT @ X / 7, D.mT @ D / 7
    return X.mT @ D / 7, LayerFactors(left, right, squares, weight, axes=fo.MatrixAxes(1, 2, 0))


def run(tx: Any, squares: bool = False) -> tuple[np.ndarray, Any]:
    """The experts after each step, and the state at the end."""
    params, out = {"w": jnp.ones((E, M, N))}, []
    state = tx.init(params)
    for t in range(STEPS):
        bases = tuple(fo.eigenbases(state, params, axes=AXES)["w"])[:2] if squares else None
        G, found = statistics(t, bases)
        updates, state = jax.jit(tx.update)({"w": G}, state, params, statistics={"w": found})
        params = optax.apply_updates(params, updates)
        out.append(params["w"])
    return np.stack(out), state


def reference(method: Kfac, e: int, squares: bool) -> np.ndarray:
    out = []
    for t in range(STEPS):
        if (seen := rows(e, t)) is None:
            out.append(method.step(np.zeros((M, N))))
            continue
        X, D = seen
        measured = lambda Q_A, Q_B, X=X, D=D: ((X @ Q_A) ** 2).T @ (D @ Q_B) ** 2 / 7  # noqa: E731
        out.append(method.step(X.T @ D / 7, X.T @ X / 7, D.T @ D / 7, measured if squares else None))
    return np.stack(out)


AXES = {"w": fo.MatrixAxes(1, 2, 0)}
METHODS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "kfac": (fo.kfac, {}, {}),
    "kfac, inverse": (fo.kfac, {"decomposition": "inverse"}, {"factored": True}),
    "kfac, packed": (fo.kfac, {"packed": True}, {}),
    "ekfac": (fo.ekfac, {}, {"corrected": True}),
}


@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_each_expert_on_its_own_rows(name: str) -> None:
    method, words, of_reference = METHODS[name]
    tx = method(0.01, damping=0.1, precondition_frequency=4, axes=AXES, **grouped(**words))
    squares = method is fo.ekfac
    found, _ = run(tx, squares)
    for e in range(E):
        numpy = Kfac(np.ones((M, N)), 0.01, damping=0.1, precondition_frequency=4, **of_reference)
        np.testing.assert_allclose(found[:, e], reference(numpy, e, squares), **EXACT)
    assert (found[:, -1] == 1).all()


@pytest.mark.parametrize("decay", ["number", "plain means"])
@pytest.mark.parametrize("method", [fo.scale_by_kfac, fo.scale_by_ekfac, fo.scale_by_kfac_soap])
def test_factors_and_their_weights_are_of_the_steps_with_rows(method: Any, decay: str) -> None:
    β = 0.9 if decay == "number" else lambda t: 1 - 1 / jnp.float64(t + 1)
    name = "shampoo_beta" if method is fo.scale_by_kfac_soap else "curvature_decay"
    _, state = run(method(**{name: β}, axes=AXES), method is fo.scale_by_ekfac)
    states = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MatrixState))
    (factors,) = (x.factors for x in states if isinstance(x, MatrixState))
    for e in range(E):
        steps = [seen for t in range(STEPS) if (seen := rows(e, t)) is not None]
        n = len(steps)
        ages = np.arange(n)[::-1]
        weights = 0.1 * 0.9**ages if decay == "number" else np.full(n, 1 / max(n, 1))
        assert factors.seen[0][e] == n
        np.testing.assert_allclose(factors.seen[1][e], weights.sum(), **EXACT)
        for side, k in ((factors.left, 0), (factors.right, 1)):
            moments = [seen[k].T @ seen[k] / 7 for seen in steps]
            wanted = sum((w * S for w, S in zip(weights, moments, strict=True)), np.zeros(side.shape[1:]))
            np.testing.assert_allclose(side[e], wanted, **EXACT)


def test_a_refused_step_counts_no_rows() -> None:
    """A gradient that is not finite leaves all as it is, an expert's first rows included."""
    tx, params = fo.kfac(0.01, axes=AXES), {"w": jnp.ones((E, M, N))}
    G, found = statistics(2)
    update = jax.jit(lambda G, state: tx.update({"w": G}, state, params, statistics={"w": found}))
    updates, state = update(G * jnp.nan, tx.init(params))
    assert not np.asarray(updates["w"]).any()
    again = update(G, state)[0]["w"]
    fresh = update(G, tx.init(params))[0]["w"]
    np.testing.assert_allclose(again, fresh, **EXACT)


def chosen_by_one(p: Any, x: Any, gates: Any) -> Any:
    """Every expert on all rows, of which gates choose."""
    h = jnp.einsum("bi,eio->beo", x, p["w"])
    return fo.losses.gaussian(jnp.einsum("beo,be->bo", h, gates), jnp.zeros((len(x), N)))


def dispatched(p: Any, x: Any, gates: Any) -> Any:
    """Each expert on the rows that gates send to it, zeros in the other places."""
    h = jnp.einsum("ebi,eio->ebo", x * gates.T[..., None], p["w"])
    return fo.losses.gaussian(jnp.einsum("ebo,be->bo", h, gates), jnp.zeros((len(x), N)))


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_dense_experts_whose_rows_are_all_masked_stay(method: str) -> None:
    """No gradient reaches them, whether their rows are zeros or gates of zero come after."""
    params, x = {"w": jnp.asarray(drawn(3, M, N))}, jnp.asarray(drawn(8, M))
    gates = jax.nn.one_hot(jnp.arange(8) % 2, 3, dtype=x.dtype)  # nobody's choice is the third
    squares = method == "ekfac"
    grad_fn = fo.value_and_grad(dispatched, fo.KroneckerFactors(squares=squares))
    axes = fo.infer_axes(dispatched, params, x, gates)
    tx = getattr(fo, method)(0.01, axes=axes)
    state = tx.init(params)

    @jax.jit
    def step(state: Any, gates: Any) -> Any:
        options = {"bases": fo.eigenbases(state, params, axes=axes)} if squares else {}
        _, grads, stats = grad_fn(params, x, gates, **options)
        return tx.update(grads, state, params, statistics=stats)[1]

    def kept(state: Any) -> Any:
        states = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, MatrixState))
        (found,) = (x for x in states if isinstance(x, MatrixState))
        of_all = (found.factors, *([found.application.nu, found.application.weight] if squares else []))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(of_all)]

    everyone = step(step(state, gates[:, [0, 2, 1]]), gates[:, [2, 1, 0]])
    before, after = kept(everyone), kept(step(everyone, gates))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new[2], old[2])
        assert not np.array_equal(new[0], old[0])


def test_a_joint_statistic_of_dense_experts_is_one_matrix() -> None:
    """Experts that share their input: their one B is zero only if no gate chose any."""
    params, x = {"w": jnp.asarray(drawn(3, M, N))}, jnp.asarray(drawn(8, M))
    gates = jax.nn.one_hot(jnp.arange(8) % 2, 3, dtype=x.dtype)
    tx = fo.kfac(0.01, axes=fo.infer_axes(chosen_by_one, params, x, gates, statistics=fo.KroneckerFactors()))
    _, grads, stats = fo.value_and_grad(chosen_by_one)(params, x, gates)
    updates = tx.update(grads, tx.init(params), params, statistics=stats)[0]["w"]
    assert np.asarray(updates).any((1, 2)).tolist() == [True, True, False]
