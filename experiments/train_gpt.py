"""Trains a character-level GPT on real text with any optimizer of `optimizers.METHODS`.

    python -m experiments.train_gpt --optimizer soap --out runs/soap
    python -m experiments.train_gpt --preset shakespeare-char --dtype bfloat16 --optimizer muon --out runs/shakespeare
    python -m experiments.train_gpt --data shakespeare --start runs/soap --lr 2e-3 --out runs/fine-tuned

The last goes on from the first one's parameters, with another text: its model and its symbols are the first one's.
A run that is killed goes on with ``--resume --out FOLDER`` and ends in bitwise the parameters it would have had.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import fisher_optax as fo
from experiments.gpt_config import PRESETS, SHAPE, Config, make_model, shaped_as
from experiments.loop import Diverged as Diverged
from experiments.loop import Plan, ending_with_a_message, run_steps
from experiments.models.gpt import GPT
from experiments.optimizers import find_method, gradients, scheduled
from experiments.options import make_parser, require
from experiments.run_folder import Row, RunFolder, as_if_computed, read_config_as
from experiments.text import Corpus, load_corpus
from experiments.trained_gpt import Params, Trained, digest, load_start

SAMPLE_CHARACTERS = 500
TEMPERATURE = 0.8

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
    return dataclasses.replace(
        config, preset="", data="", start="", vocab=0, seed=0, lr=1.0, eval_every=1, eval_batches=1
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


def copied_into(model: GPT, start: Params) -> Params:
    """``start`` as the model's parameters, for a step overwrites what it is given.

    Raises:
        ValueError: they are those of another model.
    """
    wanted, found = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (jax.eval_shape(functools.partial(initial_params, model), jax.random.key(0)), start)
    )
    if different := [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]:
        name = different[0]
        raise ValueError(
            f"cannot start with these parameters: {name} has the shape {found.get(name)} there and {wanted.get(name)} "
            f"in a GPT of this configuration and text. Take both from the run that they are of."
        )
    return as_if_computed(start)


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
    start: Params | None = None,
    progress: bool = False,
    on_evaluation: Callable[[Row], object] | None = None,
) -> list[Row]:
    """Trains, and returns an entry an evaluation: at step 0, every ``eval_every`` steps and at the end.

    Args:
        config: what to train, with what.
        corpus: the text; by default what ``config.data`` names. Pass it to train many times on one.
        run: where to write; by default nothing is written. One opened with ``resume=True`` goes on from its checkpoint.
        start: parameters to begin with, for a ``corpus`` in their symbols; by default those of the run
            ``config.start``, if any, or random ones.
        progress: show a progress bar.
        on_evaluation: called with each new entry.

    Returns:
        Entries ``{"step", "train_loss", "val_loss", "seconds", "training_seconds", "tokens"}``: losses in nats per
        character over fixed windows, without dropout; wall-clock time with and without compilation and evaluations;
        characters trained on so far.

    Raises:
        ValueError, OSError: the configuration, the text or what to start from is at fault.
        Diverged: the loss is not finite. What ``run`` holds is from before.

    Example:
        >>> rows = train(Config(optimizer="muon", layers=1, width=32, steps=20))
        >>> rows[-1]["val_loss"] < rows[0]["val_loss"]
        True
    """
    began = time.perf_counter()
    config = config.resolve()
    if start and corpus is None:
        raise ValueError("start= came without corpus=: pass the text, too, in the symbols of these parameters.")
    if corpus is None or (config.start and not start):
        _, own, saved = begin(config, SHAPE)
        corpus, start = corpus or own, start or (saved and saved.params)
    program, model = program_of(config), make_model(config, len(corpus.characters))
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    params = copied_into(model, start) if start else initial_params(model, init_key)
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


def begin(config: Config, given: Collection[str]) -> tuple[Config, Corpus, Trained | None]:
    """The whole configuration, the text in its symbols, and the run that ``config.start`` names; ``given`` as in
    `shaped_as`.
    """
    start, characters = load_start(Path(config.start)) if config.start else (None, "")
    config = (shaped_as(config, start.config, given) if start else config).resolve()
    return config, load_corpus(config.data, config.vocab, config.context, characters), start


def prepare(
    given: dict[str, Any], out: Path, resume: bool, overwrite: bool
) -> tuple[Config, Corpus, RunFolder, Params | None]:
    """Everything that can be wrong with a command line, before anything is compiled or deleted."""
    base = read_config_as(Config, out) if resume else PRESETS[given.get("preset", "cpu")]
    config = dataclasses.replace(base, **given)
    apart = not config.start or Path(config.start).resolve() != out.resolve()
    require(config, apart, "start", "another run than --out")
    config, corpus, start = begin(config, given)
    described = {**dataclasses.asdict(config), "text_sha256": corpus.sha256}
    if start:
        described |= {"start_sha256": digest(*jax.tree.leaves(start.params)), "characters": corpus.characters}
    run = RunFolder(out, described, resume=resume, overwrite=overwrite)
    return config, corpus, run, start and start.params


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(Config, (__doc__ or "").partition("\n")[0], "runs/gpt", {"preset": list(PRESETS)})
    given = vars(parser.parse_args(arguments))
    out = Path(given.pop("out"))
    try:
        config, corpus, run, start = prepare(given, out, given.pop("resume"), given.pop("overwrite"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rare = f" ({corpus.unknown:,} characters have none of their own)" if corpus.unknown else ""
    text = f"{len(corpus.train):,} characters, {len(corpus.characters)} symbols{rare}"
    print(f"{config.optimizer} on {text}; into {out}")
    with ending_with_a_message(out):
        rows = train(config, corpus, run, start=start, progress=True)
    print(run.sample.read_text(encoding="utf-8"))
    print(f"validation loss {rows[-1]['val_loss']:.4f} after {rows[-1]['seconds']:.0f} s; curve in {run.plot}")


if __name__ == "__main__":
    main()
