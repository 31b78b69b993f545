"""What `lm_head.py` measures: the Fisher of each token's row of the embedding, by labels and texts, and its spectra.

The embedding is the GPT's head too. As a head alone, on hidden states h_t that are taken for given, the true Fisher of
the row of token v is ``E_t[p_tv (1 - p_tv) |h_t|²]`` in closed form, the truth that drawn labels are checked against.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import fisher_optax as fo
from experiments.lm_head_folder import Results
from experiments.lm_head_text import Text
from experiments.models.gpt import GPT
from experiments.train_gpt import Params, mean_loss
from experiments.trained_gpt import Trained
from fisher_optax.fisher import BlockSpectrum, Density, DiagonalFisher, SoftmaxHead, Spectrum

EMBEDDING = "embed/embedding"
BATCH = 8  # sequences

DENSITY_PRODUCTS = 20
# Scores of single tokens that the blocks' spectra are made of, each as long as the parameters; fewer where they fill
# more than a gigabyte.
ROWS, ROWS_NUMBERS = 256, 2**28


class Measured(NamedTuple):
    """By token, or of all parameters; Fishers are per token of text."""

    model: DiagonalFisher  # labels drawn from the model
    other: DiagonalFisher  # ... on the other text
    empirical: DiagonalFisher  # the text's own labels
    head_model: DiagonalFisher  # of the head alone
    head_empirical: DiagonalFisher
    head_true: np.ndarray  # over all labels, exact
    losses: tuple[float, float]  # nats per character on either text
    spectrum: Spectrum
    density: Density
    blocks: dict[str, BlockSpectrum]
    drawn: int  # labels that the blocks are of


def token_rows(path: str, squares: Array) -> Any:
    """The group of each token; other parameters have none."""
    return jnp.sum(squares, -1) if path == EMBEDDING else ()


def rows_of(fisher: DiagonalFisher) -> DiagonalFisher:
    """The one leaf that `token_rows` leaves, as an array."""
    return fisher._replace(mean=jax.tree.leaves(fisher.mean)[0], m2=jax.tree.leaves(fisher.m2)[0])


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(model: GPT, params: Params, windows: Array) -> Float[Array, "batch time width"]:
    """What the head is applied to."""
    found: Any = model.apply(
        {"params": params}, windows[:, :-1], capture_intermediates=lambda module, _: module.name == "norm",
        mutable=["intermediates"],
    )  # fmt: skip
    return found[1]["intermediates"]["norm"]["__call__"][0]


def head_logits(params: Params, hidden: Float[Array, "*positions width"]) -> Float[Array, "*positions symbols"]:
    return jnp.matmul(hidden, params["embed"]["embedding"].T, precision=jax.lax.Precision.HIGHEST)


def head_loss(params: Params, example: tuple[Float[Array, "time width"], Int[Array, " time"]]) -> Any:
    """Of one sequence of hidden states, and their labels."""
    hidden, labels = example
    return fo.losses.softmax_cross_entropy(head_logits(params, hidden), labels)


@dataclasses.dataclass(frozen=True)
class WindowLoss:
    """Of one window, or the mean over several; equal for equal models, so that each is compiled once."""

    model: GPT

    def __call__(self, params: Params, windows: Array) -> Any:
        return mean_loss(self.model, params, jnp.atleast_2d(windows), fo.losses.softmax_cross_entropy)


def cut(windows: np.ndarray) -> list[np.ndarray]:
    return [windows[i : i + BATCH] for i in range(0, len(windows), BATCH)]


def exact_head(trained: Trained, batches: Iterable[Any]) -> dict[str, Any]:
    """The true Fisher of the head's rows, and the loss in nats per character."""
    scores, loss, total = np.zeros(len(trained.params["embed"]["embedding"])), 0.0, 0
    for hidden, labels in batches:
        logits = head_logits(trained.params, hidden)
        scores += labels.size * np.asarray(SoftmaxHead.from_logits(logits).row_scores(hidden), np.float64)
        loss += labels.size * float(fo.losses.softmax_cross_entropy(logits, labels))
        total += labels.size
    return {"rows": (scores / total).tolist(), "loss": loss / total}


def measure(trained: Trained, texts: list[Text], config: Any, results: Results) -> Measured:
    """Everything, or what ``results`` has not yet."""
    model, params, loss = trained.model, trained.params, WindowLoss(trained.model)
    drawn = {"fisher": "mc", "n_samples": config.samples, "key": jax.random.key(config.seed)}

    def head_examples(text: Text) -> Iterator[Any]:
        for windows in cut(text.windows):
            yield hidden_states(model, params, jnp.asarray(windows)), jnp.asarray(windows[:, 1:])

    def fisher(name: str, text: Text, head: bool = False, **how: Any) -> DiagonalFisher:
        batches = cut(text.windows)
        of = (head_loss, {"embed": params["embed"]}, head_examples(text)) if head else (loss, params, batches)
        return rows_of(results.fisher(name, *of, len(batches), token_rows, unit=config.unit, **how))

    text, other = texts
    fishers = (
        fisher("model-labels", text, **drawn),
        fisher("other-text", other, **drawn),
        fisher("text-labels", text),
        fisher("head-model-labels", text, head=True, **drawn),
        fisher("head-text-labels", text, head=True),
    )
    exact, apart = (
        results.numbers(name, lambda t=t, name=name: exact_head(
            trained, tqdm(head_examples(t), total=len(cut(t.windows)), desc=name, unit="batch")
        ))
        for name, t in (("head-exact", text), ("head-exact-other", other))
    )  # fmt: skip
    losses = exact["loss"], apart["loss"]
    return Measured(*fishers, np.array(exact["rows"]), losses, *spectra(trained, text, config, results))


def arrays(found: dict[str, Any]) -> dict[str, Any]:
    """With the lists that JSON has for them."""
    return {name: jnp.asarray(value) if isinstance(value, list) else value for name, value in found.items()}


def spectra(
    trained: Trained, text: Text, config: Any, results: Results
) -> tuple[Spectrum, Density, dict[str, BlockSpectrum], int]:
    """Of a few sequences: the largest eigenvalues and the density of the true Fisher, and the blocks of one
    whose labels are drawn, each token's once.
    """
    few = text.windows[np.linspace(0, len(text.windows) - 1, config.spectrum_sequences).astype(int)]
    loss = WindowLoss(trained.model)
    F = fo.fisher.operator(loss, trained.params, few)
    context = few.shape[1] - 1
    rows = max(1, min(ROWS, ROWS_NUMBERS // F.size))
    sample = few[: max(1, rows // context), : min(context, rows) + 1]
    key = jax.random.key(config.seed)

    def largest() -> dict[str, Any]:
        with tqdm(total=1, desc="largest eigenvalues", unit="spectrum") as bar:
            found = fo.fisher.spectrum(F, config.eigenvalues, key=key)
            bar.update()
        return {name: np.asarray(getattr(found, name)).tolist() for name in ("eigenvalues", "residuals")}

    def spread() -> dict[str, Any]:
        bar = functools.partial(tqdm, desc="density", unit="vector")
        found = fo.fisher.density(F, probes=config.probes, iterations=DENSITY_PRODUCTS, key=key, progress=bar)
        return {name: value if name == "size" else np.asarray(value).tolist() for name, value in vars(found).items()}

    def blocks() -> dict[str, Any]:
        drawn = fo.fisher.operator(loss, trained.params, sample, fisher="mc", key=key)
        found = fo.fisher.block_spectra(drawn, progress=functools.partial(tqdm, desc="blocks", unit="block"))
        return {
            name: {**block._asdict(), "eigenvalues": np.asarray(block.eigenvalues).tolist()}
            for name, block in found.items()
        }

    top = arrays(results.numbers("spectrum", largest))
    spectrum = Spectrum(top["eigenvalues"], jnp.zeros((config.eigenvalues, 0)), top["residuals"])
    density = Density(**arrays(results.numbers("density", spread)))
    found = {name: BlockSpectrum(**arrays(block)) for name, block in results.numbers("blocks", blocks).items()}
    return spectrum, density, found, sample[:, 1:].size
