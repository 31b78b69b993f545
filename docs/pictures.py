"""The pictures of the pages on methods: `python docs/pictures.py`, or `python docs/pictures.py soap muon` for some.

Left, a regression with two correlated inputs: the paths that plain descent, Adam and the method take down a tilted
valley, on the same noisy batches, each at the best of a few rates that fall to 0. Right, a regression from 16 inputs to
16 outputs: the singular values of the gradient after some batches, and of the step that the method makes of it.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import fisher_optax as fo

FOLDER = Path(__file__).parent / "pictures"
STEPS, BATCH = 40, 64
RATES = np.geomspace(1e-2, 1.5, 13)
START, GOAL = np.array([-2.4, 1.1]), np.zeros(2)


class Method(NamedTuple):
    """An optimizer of its schedule of rates, and the statistics that it takes."""

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    statistics: fo.StatisticsKind | None = None


class Problem(NamedTuple):
    """A regression ``y = x W + noise``, with inputs of this covariance."""

    covariance: np.ndarray
    start: np.ndarray
    target: np.ndarray

    def batches(self, steps: int) -> Iterator[tuple[jax.Array, jax.Array]]:
        """The same ones at every call."""
        rng, root = np.random.default_rng(0), np.linalg.cholesky(self.covariance)
        for _ in range(steps):
            x = rng.normal(size=(BATCH, len(root))) @ root.T
            y = x @ self.target + 0.1 * rng.normal(size=(BATCH, self.target.shape[1]))
            yield jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def excess(self, W: np.ndarray) -> np.ndarray:
        """The exact loss above its least, of one weight or a stack of them."""
        Δ = W - self.target
        return 0.5 * np.einsum("...in,ij,...jn->...", Δ, self.covariance, Δ)


# Without momentum, which would hide where a step points, and with a new basis at every step. FROG has some momentum,
# since its steps are normalised.
FRESH = {"weight_decay": 0.0, "precondition_frequency": 1}
METHODS = {
    "soap": Method(lambda rate: fo.soap(rate, b1=0.0, **FRESH)),
    "muon": Method(lambda rate: fo.muon(rate, beta=0.0)),
    "shampoo": Method(lambda rate: fo.shampoo(rate, b1=0.0, exponent=-0.5, **FRESH)),
    "dykaf": Method(lambda rate: fo.dykaf(rate, b1=0.0, **FRESH)),
    "soap_muon": Method(lambda rate: fo.soap_muon(rate, b1=0.0)),
    "newton_muon": Method(lambda rate: fo.newton_muon(rate, beta=0.0, precondition_frequency=1), fo.InputGram()),
    "kl": Method(lambda rate: fo.kl_soap(rate, b1=0.0, **FRESH)),
    "kfac": Method(lambda rate: fo.kfac(rate, momentum=0.0, **FRESH), fo.KroneckerFactors()),
    "ekfac": Method(lambda rate: fo.ekfac(rate, momentum=0.0, **FRESH), fo.KroneckerFactors(squares=True)),
    "kfac_soap": Method(lambda rate: fo.kfac_soap(rate, b1=0.0, **FRESH), fo.KroneckerFactors()),
    "frog": Method(lambda rate: fo.frog(rate, momentum=0.5, damping=1e-2), fo.LayerSamples(BATCH)),
}
PLAIN = {"SGD": Method(lambda rate: optax.sgd(rate)), "Adam": Method(lambda rate: optax.adam(rate, b1=0.0))}
LABELS = {
    "soap": "SOAP",
    "soap_muon": "SOAP-Muon",
    "newton_muon": "Newton-Muon",
    "dykaf": "DyKAF",
    "kl": "KL-SOAP",
    "kfac": "K-FAC",
    "ekfac": "EKFAC",
} | {
    "kfac_soap": "KFAC-SOAP",
    "frog": "FROG",
}


def valley() -> Problem:
    """Two inputs with a correlation: the loss is a valley that lies across both axes."""
    angle = np.deg2rad(30)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return Problem(turn @ np.diag([0.04, 1.0]) @ turn.T, START[:, None], GOAL[:, None])


def square() -> Problem:
    """Sixteen inputs whose variances fall from 1 to a thousandth."""
    rng = np.random.default_rng(1)
    Q = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    target = rng.normal(size=(16, 16))
    return Problem(Q @ np.diag(np.geomspace(1, 1e-3, 16)) @ Q.T, np.zeros((16, 16)), target)


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """Half the squared error, as the likelihood of a Gaussian of variance 1."""
    return fo.losses.gaussian(x @ params["kernel"], y)


def trained(method: Method, rates: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each rate all weights on the way, the last gradient and the last step."""
    x, y = (jnp.stack(arrays) for arrays in zip(*problem.batches(STEPS), strict=True))
    start = {"kernel": jnp.asarray(problem.start, jnp.float32)}
    # The true Fisher: the empirical one of a fitted model is that of its noise.
    of_gradients = isinstance(method.statistics, fo.KroneckerFactors) and "right" in method.statistics.sides
    fisher = "true" if of_gradients else "empirical"
    gradient = fo.value_and_grad(loss, method.statistics, fisher=fisher) if method.statistics else None
    with_bases = isinstance(method.statistics, fo.KroneckerFactors) and method.statistics.squares

    def at(rate: jax.Array) -> tuple[jax.Array, ...]:
        tx = optax.with_extra_args_support(method.make(lambda count: rate * (1 - count / STEPS)))

        def step(carry: tuple[Any, Any], batch: tuple[jax.Array, jax.Array]) -> tuple[tuple[Any, Any], tuple[Any, ...]]:
            params, state = carry
            if gradient is None:
                extra, grads = {}, jax.grad(loss)(params, *batch)
            else:
                bases = {"bases": fo.eigenbases(state, params)} if with_bases else {}
                _, grads, stats = gradient(params, *batch, **bases)
                extra = {"statistics": stats}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
            return (params, state), (params["kernel"], grads["kernel"], updates["kernel"])

        return jax.lax.scan(step, (start, tx.init(start)), (x, y))[1]

    path, grads, updates = map(np.asarray, jax.jit(lambda rates: jax.lax.map(at, rates))(jnp.asarray(rates)))
    begin = np.broadcast_to(problem.start, (len(rates), 1, *problem.start.shape))
    return np.concatenate([begin, path], axis=1), grads[:, -1], updates[:, -1]


def best_path(method: Method, problem: Problem) -> np.ndarray:
    """Down the valley at the rate whose losses over all steps have the least mean."""
    paths = trained(method, RATES, problem)[0]
    means = problem.excess(paths).mean(axis=1)
    return paths[np.argmin(np.nan_to_num(means, nan=np.inf))]


def draw_paths(ax: Axes, problem: Problem, paths: dict[str, np.ndarray], colours: dict[str, str]) -> None:
    """Contours of the exact loss, and every path on them."""
    across, up = np.meshgrid(np.linspace(-3, 1.2, 120), np.linspace(-1, 1.8, 120))
    height = problem.excess(np.stack([across, up], -1)[..., None])
    ax.contour(across, up, height, np.geomspace(1e-3, 3, 12), colors="0.85", linewidths=0.8)
    for name, path in paths.items():
        ax.plot(*path[..., 0].T, ".-", color=colours[name], label=name, linewidth=1.4, markersize=4)
    ax.plot(*GOAL, "k*", markersize=10)
    ax.set(title=f"down a tilted valley, {STEPS} steps", xlabel="first weight", ylabel="second weight")
    ax.set(xlim=(-3, 1.2), ylim=(-1, 1.8))
    ax.legend(loc="upper right", fontsize=8)


def draw_spectrum(ax: Axes, method: Method, label: str, colour: str) -> None:
    """Singular values of a gradient and of the step made of it, as shares of the largest."""
    _, (gradient,), (step,) = trained(method, np.array([1e-2]), square())
    for name, matrix, shade in (("gradient", gradient, "0.55"), (f"step of {label}", step, colour)):
        values = np.linalg.svd(matrix, compute_uv=False)
        ax.plot(np.arange(1, len(values) + 1), values / values[0], "o-", color=shade, label=name, markersize=4)
    ax.set(
        title="singular values, largest = 1", xlabel="number", yscale="log", ylim=(1e-3, 1.6), xticks=(1, 4, 8, 12, 16)
    )
    ax.legend(loc="lower left", fontsize=8)


def draw(name: str, plain: dict[str, np.ndarray]) -> Path:
    """The picture of one method, written to `docs/pictures`."""
    label, problem = LABELS.get(name, name.capitalize()), valley()
    paths = {**plain, label: best_path(METHODS[name], problem)}
    colours = {"SGD": "0.55", "Adam": "tab:blue", label: "tab:red"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained", width_ratios=(3, 2))
    draw_paths(left, problem, paths, colours)
    draw_spectrum(right, METHODS[name], label, colours[label])
    path = save(figure, name)
    plt.close(figure)
    return path


def draw_gallery() -> Path:
    """The picture of the page on the gallery, by the program that stands there."""
    page = (FOLDER.parent / "examples" / "fisher_gallery.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    return save(names["figure"], "fisher_gallery")


def save(figure: Figure, name: str) -> Path:
    """As a PNG of few colours, which has a quarter of the bytes and looks the same."""
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=100)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
    return path


def main() -> None:
    """Draw what the command line asks for."""
    known = [*METHODS, "fisher_gallery"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="METHOD", help=f"of {', '.join(known)}; without any, all")
    names = parser.parse_args().names or known
    if unknown := set(names) - set(known):
        parser.error(f"there is no picture of {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    plain = {name: best_path(method, valley()) for name, method in PLAIN.items()}
    for name in tqdm(names, desc="pictures"):
        draw(name, plain) if name in METHODS else draw_gallery()


if __name__ == "__main__":
    warnings.simplefilter("error", fo.AxesWarning)  # a kernel in the fallback would show Adam's path
    plt.switch_backend("agg")
    main()
