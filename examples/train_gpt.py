"""Trains a character-level GPT on real text with any optimizer of `optimizers.METHODS`.

    python examples/train_gpt.py --optimizer soap --out runs/soap
    python examples/train_gpt.py --preset shakespeare-char --dtype bfloat16 --optimizer muon --out runs/shakespeare

A run that is killed goes on with ``--resume --out FOLDER`` and ends in bitwise the parameters it would have had.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import fisher_optax as fo
from gpt_config import PRESETS, Config
from loop import Diverged as Diverged
from loop import Plan, ending_with_a_message, run_steps
from models.gpt import GPT
from optimizers import find_method, gradients, scheduled
from options import make_parser
from run_folder import Row, RunFolder, read_config_as
from text import Corpus, load_corpus

SAMPLE_CHARACTERS = 500
TEMPERATURE = 0.8

Params = Any  # a tree of arrays
Scalar = Float[Array, ""]
Count = Int[Array, ""]
Windows = Int[Array, "batch context+1"]  # each with the character that follows its context


class State(NamedTuple):
    """Everything a step reads or changes besides the text; a checkpoint is this."""

    params: Params
    opt_state: optax.OptState
    step: Count
    key: PRNGKeyArray  # of the whole run; a step folds its own from it, so no position in the data needs saving


# The functions below compile once for what they depend on: a model, or a `program`, the configuration without what is
# an argument of `advance` or does not concern it. So trying many rates, seeds and texts compiles nothing anew.


def program_of(config: Config) -> Config:
    return dataclasses.replace(config, preset="", data="", vocab=0, seed=0, lr=1.0, eval_every=1, eval_batches=1)


def make_model(config: Config, symbols: int) -> GPT:
    c = config
    return GPT(
        symbols, c.context, c.layers, c.width, c.heads, c.dropout, dtype=jnp.dtype(c.dtype), tied=c.head == "tied"
    )


def make_optimizer(program: Config, peak: Scalar | float) -> optax.GradientTransformationExtraArgs:
    return scheduled(find_method(program.optimizer), program, peak, program.warmup, program.steps)


def cross_entropy(logits: Float[Array, "*positions symbols"], labels: Int[Array, "*positions"]) -> Scalar:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mean_loss(model: GPT, params: Params, windows: Windows, loss: Any = cross_entropy, **how: Any) -> Scalar:
    """Nats per character."""
    logits = jnp.asarray(model.apply({"params": params}, windows[:, :-1], **how))
    return loss(logits, windows[:, 1:])


@functools.partial(jax.jit, static_argnums=0)
def initial_params(model: GPT, key: PRNGKeyArray) -> Params:
    return model.init(key, jnp.zeros((1, model.context), jnp.int32))["params"]


@functools.partial(jax.jit, static_argnums=0)
def initial_moments(program: Config, params: Params) -> optax.OptState:
    return make_optimizer(program, 1.0).init(params)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def advance(program: Config, model: GPT, state: State, text: Array, stop: Count, peak: Scalar) -> tuple[State, Scalar]:
    """The state at step ``stop``, and the mean of the losses on the way."""
    tx, method = make_optimizer(program, peak), find_method(program.optimizer)
    loss_of = fo.losses.softmax_cross_entropy if method.statistics else cross_entropy  # its own can draw labels

    def one_step(step: Count, carry: tuple[State, Scalar]) -> tuple[State, Scalar]:
        (params, opt_state, _, run_key), total = carry
        batch_key, dropout_key, fisher_key = jax.random.split(jax.random.fold_in(run_key, step), 3)
        first = jax.random.randint(batch_key, (program.batch, 1), 0, text.size - program.context)
        windows = text[first + jnp.arange(program.context + 1)]

        def loss_fn(params: Params, windows: Windows) -> tuple[Scalar, None]:
            return mean_loss(model, params, windows, loss_of, train=True, rngs={"dropout": dropout_key}), None

        (loss, _), grads, extra = gradients(loss_fn, method)(params, opt_state, windows, fisher_key)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return State(optax.apply_updates(params, updates), opt_state, step + 1, run_key), total + loss

    # Traced bounds: a chunk of any length is the same program.
    after, total = jax.lax.fori_loop(state.step, stop, one_step, (state, jnp.float32(0)))
    return after, total / (stop - state.step)


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model: GPT, params: Params, batches: Int[Array, "batches batch context+1"]) -> Scalar:
    return jax.lax.map(functools.partial(mean_loss, model, params), batches).mean()


@functools.partial(jax.jit, static_argnums=0)
def sample(model: GPT, params: Params, first: Count, key: PRNGKeyArray) -> Int[Array, " characters"]:
    """`SAMPLE_CHARACTERS` tokens after ``first``, each drawn given the last ``context``."""

    def next_character(carry: tuple[Array, Count], key: PRNGKeyArray) -> tuple[tuple[Array, Count], Count]:
        window, newest = carry
        logits = jnp.asarray(model.apply({"params": params}, window[None]))[0, newest]
        token = jax.random.categorical(key, logits / TEMPERATURE).astype(window.dtype)
        window = jnp.where(newest + 1 == model.context, jnp.roll(window, -1), window)
        newest = jnp.minimum(newest + 1, model.context - 1)
        return (window.at[newest].set(token), newest), token

    window = jnp.zeros(model.context, jnp.int32).at[0].set(first)
    return jax.lax.scan(next_character, (window, jnp.int32(0)), jax.random.split(key, SAMPLE_CHARACTERS))[1]


def train(
    config: Config,
    corpus: Corpus | None = None,
    run: RunFolder | None = None,
    *,
    progress: bool = False,
    on_evaluation: Callable[[Row], object] | None = None,
) -> list[Row]:
    """Trains, and returns an entry an evaluation: at step 0, every ``eval_every`` steps and at the end.

    Args:
        config: what to train, with what.
        corpus: the text; by default what ``config.data`` names. Pass it to train many times on one.
        run: where to write; by default nothing is written. One opened with ``resume=True`` goes on from its checkpoint.
        progress: show a progress bar.
        on_evaluation: called with each new entry.

    Returns:
        Entries ``{"step", "train_loss", "val_loss", "seconds", "tokens"}``: losses in nats per character over fixed
        windows, without dropout; wall-clock time with compilation and evaluations; characters trained on so far.

    Raises:
        ValueError, OSError: the configuration or the text is at fault.
        Diverged: the loss is not finite. What ``run`` holds is from before.

    Example:
        >>> rows = train(Config(optimizer="muon", layers=1, width=32, steps=20))
        >>> rows[-1]["val_loss"] < rows[0]["val_loss"]
        True
    """
    began = time.perf_counter()
    config = config.resolve()
    corpus = corpus or load_corpus(config.data, config.vocab, config.context)
    program, model = program_of(config), make_model(config, len(corpus.characters))
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    params = initial_params(model, init_key)
    state = State(params, initial_moments(program, params), jnp.int32(0), run_key)
    text, peak = jnp.asarray(corpus.train), jnp.float32(config.lr)
    windows = [evenly_spaced_windows(part, config) for part in (corpus.train, corpus.validation)]
    plan = Plan(
        config.steps, config.eval_every, "tokens", config.batch * config.context,
        advice="Try a smaller --lr or a longer --warmup.",
    )  # fmt: skip
    state, rows = run_steps(
        plan,
        state,
        lambda state, stop: advance(program, model, state, text, jnp.int32(stop), peak),
        lambda state: dict(
            zip(("train_loss", "val_loss"), (float(evaluate(model, state.params, w)) for w in windows), strict=True)
        ),
        lambda row: f"train {row['train_loss']:.3f}, val {row['val_loss']:.3f}",
        began=began,
        run=run,
        progress=progress,
        on_evaluation=on_evaluation,
    )
    if run:
        run.sample.write_text(generate(state, model, corpus), encoding="utf-8")
    return rows


def evenly_spaced_windows(
    text: Int[np.ndarray, " characters"], config: Config
) -> Int[Array, "batches batch context+1"]:
    first = np.linspace(0, len(text) - config.context - 1, config.eval_batches * config.batch).astype(np.int32)
    windows = text[first[:, None] + np.arange(config.context + 1)]
    return jnp.asarray(windows.reshape(config.eval_batches, config.batch, -1))


def generate(state: State, model: GPT, corpus: Corpus) -> str:
    first = max(corpus.characters.find("\n"), 0)
    return corpus.decode(np.asarray(sample(model, state.params, jnp.int32(first), state.key)))


def prepare(given: dict[str, Any], out: Path, resume: bool, overwrite: bool) -> tuple[Config, Corpus, RunFolder]:
    """Everything that can be wrong with a command line, before anything is compiled or deleted."""
    base = read_config_as(Config, out) if resume else PRESETS[given.get("preset", "cpu")]
    config = dataclasses.replace(base, **given).resolve()
    corpus = load_corpus(config.data, config.vocab, config.context)
    described = {**dataclasses.asdict(config), "text_sha256": corpus.sha256}
    return config, corpus, RunFolder(out, described, resume=resume, overwrite=overwrite)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(Config, (__doc__ or "").partition("\n")[0], "runs/gpt", {"preset": list(PRESETS)})
    given = vars(parser.parse_args(arguments))
    out = Path(given.pop("out"))
    try:
        config, corpus, run = prepare(given, out, given.pop("resume"), given.pop("overwrite"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{config.optimizer} on {len(corpus.train):,} characters, {len(corpus.characters)} symbols; into {out}")
    with ending_with_a_message(out):
        rows = train(config, corpus, run, progress=True)
    print(run.sample.read_text(encoding="utf-8"))
    print(f"validation loss {rows[-1]['val_loss']:.4f} after {rows[-1]['seconds']:.0f} s; curve in {run.plot}")


if __name__ == "__main__":
    main()
