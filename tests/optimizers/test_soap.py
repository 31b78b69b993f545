"""SOAP against its authors' trajectories and against the NumPy reference, in float64."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_optax as fo
from tests.grouped import grouped
from tests.reference.adam import Adam
from tests.reference.soap import Soap

GOLDEN = np.load(Path(__file__).parent / "golden" / "soap.npz")
GOLDEN_CASES = {
    "square_f1": {"learning_rate": 3e-3, "b1": 0.95, "b2": 0.95, "weight_decay": 0.0, "precondition_frequency": 1},
    "square_f5_wd": {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.98, "weight_decay": 0.05, "precondition_frequency": 5},
    "onesided_cols": {
        "learning_rate": 3e-3,
        "b1": 0.95,
        "b2": 0.95,
        "weight_decay": 0.01,
        "precondition_frequency": 2,
        "max_precond_dim": 8,
    },
    "shampoo_beta": {
        "learning_rate": 3e-3,
        "b1": 0.95,
        "b2": 0.99,
        "shampoo_beta": 0.8,
        "weight_decay": 0.0,
        "precondition_frequency": 3,
    },
}
# Every option of the rule, each with what it could be confused with made different from its default.
OPTIONS = {
    "defaults": {},
    "weight-decay": {"weight_decay": 0.3, "precondition_frequency": 2},
    "betas": {"b1": 0.8, "b2": 0.9, "precondition_frequency": 2},
    "shampoo-beta": {"b2": 0.99, "shampoo_beta": 0.7, "precondition_frequency": 2},
    "every-step": {"precondition_frequency": 1},
    "every-fourth": {"precondition_frequency": 4},
    "no-bias-correction": {"bias_correction": False, "precondition_frequency": 2},
    "large-eps": {"eps": 0.3, "precondition_frequency": 2},
    "adam-first": {"first_step": "adam", "precondition_frequency": 2},
    "adam-first-every-step": {"first_step": "adam", "precondition_frequency": 1, "transport": "squared"},
    "squared-transport": {"transport": "squared", "precondition_frequency": 2},
    "eigh": {"decomposition": "eigh", "precondition_frequency": 2},
    "eigh-squared": {"decomposition": "eigh", "transport": "squared", "precondition_frequency": 2},
    # In the basis of its own gradient the first step is rounding off the diagonal, which a smaller eps would show.
    "before-step": {"before_step": True, "precondition_frequency": 2, "eps": 1e-2},
    "before-every-step": {"before_step": True, "precondition_frequency": 1, "eps": 1e-2, "shampoo_beta": 0.6},
    "before-step-eigh": {"before_step": True, "eps": 1e-2, "decomposition": "eigh", "transport": "squared"},
    "normalized": {"normalize_updates": True, "precondition_frequency": 2},
}


def gradients(shape: tuple[int, ...], steps: int = 12, seed: int = 0) -> np.ndarray:
    """Gradients of drifting scale around a fixed matrix, so that bases turn and orders change."""
    rng = np.random.default_rng(seed)
    fixed = rng.normal(size=shape)
    return np.stack([(1 + 0.3 * t) * rng.normal(size=shape) + fixed for t in range(steps)])


def tree_run(tx: optax.GradientTransformationExtraArgs, params: Any, grads: list[Any]) -> list[Any]:
    """Parameters after each call, under jit."""
    state, update, path = tx.init(params), jax.jit(tx.update), []
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def trajectory(tx: optax.GradientTransformationExtraArgs, W: np.ndarray, grads: np.ndarray) -> np.ndarray:
    """A single kernel after each call."""
    path = tree_run(tx, {"kernel": jnp.asarray(W)}, [{"kernel": jnp.asarray(G)} for G in grads])
    return np.stack([params["kernel"] for params in path])


def soap(**options: Any) -> optax.GradientTransformationExtraArgs:
    return fo.soap(**grouped(factor_dtype=jnp.float64, **options))


def reference(W: np.ndarray, grads: np.ndarray, **options: Any) -> np.ndarray:
    model = Soap(W, **options)
    return np.stack([model.step(G) for G in grads])


def assert_same_run(actual: np.ndarray, wanted: np.ndarray, W: np.ndarray, tolerance: float = 1e-9) -> None:
    """At every step within ``tolerance`` of the distance moved so far, which the run must have moved in the end."""
    axes = tuple(range(1, wanted.ndim))
    moved, off = (np.sqrt(np.sum((wanted - x) ** 2, axis=axes)) for x in (W, actual))
    assert moved[-1] > 0
    assert np.all(off <= tolerance * moved), (off / np.where(moved > 0, moved, 1)).max()


def start(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(9).normal(size=shape)


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_reference_follows_the_authors_trajectories(case: str) -> None:
    W, grads, wanted = (np.swapaxes(GOLDEN[f"{case}/{name}"], -1, -2) for name in ("params0", "grads", "params"))
    assert_same_run(reference(W, grads, **GOLDEN_CASES[case]), wanted, W, 1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_authors_trajectories(case: str) -> None:
    W, grads, wanted = (np.swapaxes(GOLDEN[f"{case}/{name}"], -1, -2) for name in ("params0", "grads", "params"))
    actual = trajectory(soap(**GOLDEN_CASES[case]), W, grads)
    assert_same_run(actual, wanted, W, 1e-4)
    assert_same_run(actual, reference(W, grads, **GOLDEN_CASES[case]), W)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_follows_the_reference(option: str) -> None:
    W, grads = start((6, 6)), gradients((6, 6))
    assert_same_run(trajectory(soap(**OPTIONS[option]), W, grads), reference(W, grads, **OPTIONS[option]), W)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
@pytest.mark.parametrize("option", [{"sides": "shorter"}, {"max_precond_dim": 5}], ids=str)
def test_one_sided(shape: tuple[int, int], option: dict[str, Any]) -> None:
    """Only the shorter side is turned."""
    options = {"precondition_frequency": 2} | option
    W, grads = start(shape), gradients(shape)
    assert_same_run(trajectory(soap(**options), W, grads), reference(W, grads, **options), W)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("first_step", ["skip", "adam"])
def test_a_basis_held_at_the_identity_is_adam(first_step: str) -> None:
    """With eps large enough to show where it is added, and decay large enough to show in which order."""
    options = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.97, "eps": 0.5, "weight_decay": 0.2, "first_step": first_step}
    W, grads = start((5, 3)), gradients((5, 3))
    model = Adam(W, **options)
    wanted = np.stack([model.step(G) for G in grads])
    assert_same_run(trajectory(soap(max_precond_dim=0, **options), W, grads), wanted, W, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("every", [1, 3])
def test_adaptive_refresh_between_always_and_never(every: int) -> None:
    """Tolerance 0 refreshes whenever the schedule allows; a tolerance no matrix exceeds never does."""
    W, grads = start((5, 5)), gradients((5, 5))
    for tolerance, frequency in ((0.0, every), (10.0, 10**6)):
        tx = soap(refresh="adaptive", adaptive_tolerance=tolerance, precondition_frequency=every)
        assert_same_run(trajectory(tx, W, grads), reference(W, grads, precondition_frequency=frequency), W)


def third_step_runs(W: np.ndarray, grads: np.ndarray) -> list[np.ndarray]:
    """The references refreshed every third step, by phase."""
    return [reference(W, grads, precondition_frequency=3, phase=phase) for phase in range(3)]


def nearest(run: np.ndarray, references: list[np.ndarray]) -> int:
    return int(np.argmin([np.abs(run - wanted).max() for wanted in references]))


@pytest.mark.usefixtures("x64")
def test_staggered_refresh_of_one_matrix_is_periodic() -> None:
    """Every third step, at some phase."""
    W, grads = start((5, 5)), gradients((5, 5))
    actual = trajectory(soap(refresh="staggered", precondition_frequency=3), W, grads)
    references = third_step_runs(W, grads)
    assert_same_run(actual, references[nearest(actual, references)], W)


@pytest.mark.usefixtures("x64")
def test_staggered_refresh_spreads_equal_matrices_over_the_steps() -> None:
    """Of three equal matrices each is refreshed every third step, each in another."""
    tx = soap(refresh="staggered", precondition_frequency=3)
    W, grads = start((5, 5)), gradients((5, 5))
    params, *steps = ({name: {"kernel": jnp.asarray(x)} for name in "abc"} for x in (W, *grads))
    path = tree_run(tx, params, steps)
    references = third_step_runs(W, grads)
    runs = [np.stack([params[name]["kernel"] for params in path]) for name in "abc"]
    phases = [nearest(run, references) for run in runs]
    for run, phase in zip(runs, phases, strict=True):
        assert_same_run(run, references[phase], W)
    assert sorted(phases) == [0, 1, 2]


@pytest.mark.usefixtures("x64")
def test_decay_mask_reaches_matrices_and_fallback() -> None:
    """Decayed and undecayed leaves, the biases on AdamW with the same rate, decay and mask, one call later."""
    options = {"learning_rate": 0.05, "weight_decay": 0.5, "precondition_frequency": 2}
    shapes = {"kernel": (5, 5), "bias": (5,)}
    W, G = ({k: f(shape) for k, shape in shapes.items()} for f in (start, gradients))
    params = jax.tree.map(jnp.asarray, {"decayed": W, "free": W})
    leaves, treedef = jax.tree.flatten({"decayed": G, "free": G})
    grads = [treedef.unflatten(step) for step in zip(*(jnp.asarray(g[:6]) for g in leaves), strict=True)]
    mask = {"decayed": {"kernel": True, "bias": True}, "free": {"kernel": False, "bias": False}}
    path = tree_run(soap(mask=mask, **options), params, grads)
    for name, decay in (("decayed", 0.5), ("free", 0.0)):
        wanted = reference(W["kernel"], G["kernel"][:6], **options | {"weight_decay": decay})
        assert_same_run(np.stack([p[name]["kernel"] for p in path]), wanted, W["kernel"])
        adamw = optax.adamw(0.05, 0.95, 0.95, 1e-8, weight_decay=decay)
        biases = tree_run(adamw, params[name]["bias"], [g[name]["bias"] for g in grads[1:]])
        np.testing.assert_allclose([p[name]["bias"] for p in path[1:]], biases, rtol=1e-12)
        np.testing.assert_array_equal(path[0][name]["bias"], W["bias"])


# A leaf, its axes (None: by the rules for its shape), and the matrix it is.
LEAVES = {
    "conv": ((2, 2, 2, 8), None, (8, 8)),
    "dense-general": ((6, 2, 3), fo.MatrixAxes(inputs=(0,), outputs=(1, 2)), (6, 6)),
    "attention-out": ((2, 3, 6), fo.MatrixAxes(inputs=(0, 1), outputs=(2,)), (6, 6)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_of_more_axes_are_their_matrices(leaf: str) -> None:
    shape, axes, matrix = LEAVES[leaf]
    W, grads = start(shape), gradients(shape)
    tx = soap(precondition_frequency=2, axes=None if axes is None else {"kernel": axes})
    wanted = reference(W.reshape(matrix), grads.reshape(-1, *matrix), precondition_frequency=2)
    assert_same_run(trajectory(tx, W, grads), wanted.reshape(-1, *shape), W)


@pytest.mark.usefixtures("x64")
def test_axes_in_any_order() -> None:
    """A leaf with inputs (3,), outputs (1, 0) and batch (2,) moves as its three matrices in that order of axes."""
    shape = (2, 2, 3, 4)
    W, grads = start(shape), gradients(shape)
    axes = fo.MatrixAxes(inputs=(3,), outputs=(1, 0), batch=(2,))
    actual = trajectory(soap(precondition_frequency=2, axes={"kernel": axes}), W, grads)

    def matrices(x: np.ndarray) -> list[np.ndarray]:
        x = np.moveaxis(x, (-2, -1, -3, -4), (-4, -3, -2, -1))
        return list(np.moveaxis(x.reshape(*x.shape[:-2], 4), -3, 0))

    for moved, w, gs in zip(matrices(actual), matrices(W), matrices(grads), strict=True):
        assert_same_run(moved, reference(w, gs, precondition_frequency=2), w)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sides", [(slice(0, 4), slice(4, 8)), (slice(0, 4), slice(4, 7))], ids=("equal", "uneven"))
def test_blocks_are_separate_matrices(sides: tuple[slice, slice]) -> None:
    length = sides[1].stop
    W, grads = start((length, 4)), gradients((length, 4))
    actual = trajectory(soap(precondition_frequency=2, block_size=4), W, grads)
    for rows in sides:
        assert_same_run(actual[:, rows], reference(W[rows], grads[:, rows], precondition_frequency=2), W[rows])


@pytest.mark.usefixtures("x64")
def test_packed_factors_give_the_same_run_from_less_state() -> None:
    W, grads = start((6, 6)), gradients((6, 6))
    full, packed = (soap(precondition_frequency=2, packed=packed) for packed in (False, True))
    assert_same_run(trajectory(packed, W, grads), trajectory(full, W, grads), W)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tx.init({"kernel": jnp.asarray(W)}))) for tx in (full, packed)]
    assert sizes[0] - sizes[1] == 2 * (36 - 21) * 8


@pytest.mark.usefixtures("x64")
def test_cholesky_iteration_finds_the_eigenbasis() -> None:
    """On gradients whose factors do not change, the basis converges to the one `eigh` gives, so the runs meet."""
    rng = np.random.default_rng(4)
    U, V = (np.linalg.qr(rng.normal(size=(4, 4)))[0] for _ in range(2))
    W, signs = start((4, 4)), rng.choice((-1.0, 1.0), size=(60, 4))
    grads = np.einsum("ij,tj,kj->tik", U * np.array([8.0, 4.0, 2.0, 1.0]), signs, V)
    runs = [
        trajectory(soap(precondition_frequency=1, decomposition=d, eps=1e-3), W, grads) for d in ("cholesky", "eigh")
    ]
    steps = [np.diff(r, axis=0)[-5:] for r in runs]
    np.testing.assert_allclose(*steps, atol=1e-9)


def test_storage_options_are_honoured() -> None:
    params = {"kernel": jnp.ones((6, 6))}
    half = fo.Storage(factor_dtype=jnp.bfloat16, momentum_dtype=jnp.bfloat16)
    default, small = fo.soap().init(params), fo.soap(storage=half).init(params)

    def dtypes(state: Any) -> list[str]:
        return sorted(str(x.dtype) for x in jax.tree.leaves(state) if x.size >= 36)

    assert set(dtypes(default)) == {"float32"}
    assert dtypes(small).count("bfloat16") >= 3
