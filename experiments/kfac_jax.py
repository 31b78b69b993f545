"""kfac-jax, where it is installed: its whole step on a model, and a GPT trained by it beside the others.

It owns its jit, so no flops or memory can be read from it; its loss is the model's, under kfac-jax's own registration.
Statistics are empirical and taken at every step, as in the rows it stands beside.
"""

import contextlib
import dataclasses
import functools
import importlib
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import train_gpt
from experiments.gpt_config import Config, make_model
from experiments.loop import Plan, run_steps
from experiments.run_folder import Row
from experiments.text import Corpus

NOTE = (
    "as released (0.0.8) it stops on jax 0.10: `get_bind_params` returns one value there, not two; "
    "run with `eval_jaxpr_eqn` written for that"
)
PERIOD, RATE = 10, 1e-3  # steps between inverses, and the rate, where only time counts
MOMENTUM = 0.9
DAMPING = 1e-3  # that of fo.kfac
SETTINGS = {"l2_reg": 0.0, "estimation_mode": "fisher_empirical", "curvature_ema": 0.95, "num_burnin_steps": 0}


def load_kfac_jax() -> Any:
    """The package, able to run on this JAX; see `NOTE`.

    Raises:
        ImportError: it, or something it needs, is not installed.
    """
    with silenced():
        kfac_jax = importlib.import_module("kfac_jax")
        matcher: Any = importlib.import_module("kfac_jax._src.tag_graph_matcher")
    matcher.eval_jaxpr_eqn = evaluate_equation
    return kfac_jax


def evaluate_equation(equation: Any, inputs: list[Any]) -> list[Any]:
    found = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
    return found if isinstance(found, list) else [found]


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without the warnings that older code draws from a newer JAX, and without what it prints."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        yield


class KfacJax:
    """kfac-jax on a model with ``init``, ``logits`` and ``loss``, and the parameters and state that it has reached."""

    def __init__(self, model: Any, batch: Any):
        kfac_jax = load_kfac_jax()
        registers = {
            "softmax_cross_entropy": kfac_jax.register_softmax_cross_entropy_loss,
            "sigmoid_cross_entropy": kfac_jax.register_multi_bernoulli_predictive_distribution,
        }
        register = registers[model.loss.__name__]

        def loss(params: Any, batch: Any) -> Any:
            logits = model.logits(params, batch[0])
            register(*flat(logits, batch[1]))
            return model.loss(logits, batch[1])

        self.tx = kfac_jax.Optimizer(jax.value_and_grad(loss), inverse_update_period=PERIOD, **SETTINGS)
        self.params = jax.jit(model.init)(jax.random.key(0))
        with silenced():
            self.state = self.tx.init(self.params, jax.random.PRNGKey(0), batch[:2])
            self(batch)  # compiles, and fails here if at all

    def __call__(self, batch: Any) -> Any:
        given = {"learning_rate": RATE, "momentum": MOMENTUM, "damping": DAMPING}
        self.params, self.state, seen = self.tx.step(
            self.params, self.state, jax.random.PRNGKey(0), batch=batch[:2], **given
        )
        return self.params, seen["loss"]


def flat(logits: Any, labels: Any) -> tuple[Any, Any]:
    """With the positions of a sequence as examples, which is what kfac-jax's losses are registered with."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows, labels.reshape(rows.shape if labels.shape == logits.shape else -1)


class State(NamedTuple):
    """What `loop.run_steps` carries, here between kfac-jax's steps."""

    params: Any
    opt_state: Any
    step: Any
    key: Any


def train_kfac_jax(config: Config, corpus: Corpus) -> list[Row]:
    """As `train_gpt.train`: the same model, initial parameters, batches, schedule and evaluations, stepped by kfac-jax.

    Inverses every ``config.refresh`` steps; ``config.damping`` constant, `DAMPING` by default. There is no weight
    decay: kfac-jax has none that is decoupled.

    Raises:
        ImportError: kfac-jax is not installed.
        ValueError, Diverged: as `train_gpt.train`.
    """
    began = time.perf_counter()
    config = dataclasses.replace(config, optimizer="kfac").resolve()
    tx, model = make_optimizer(config, corpus)
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    params, text = train_gpt.initial_params(model, init_key), jnp.asarray(corpus.train)
    held = [train_gpt.evenly_spaced_windows(part, config) for part in (corpus.train, corpus.validation)]
    rate = optax.warmup_cosine_decay_schedule(0.0, config.lr, config.warmup, config.steps, end_value=0.1 * config.lr)

    def advance(state: State, stop: int) -> tuple[State, Any]:
        losses = []
        for step in range(int(state.step), stop):
            given = {"learning_rate": rate(step + 1), "momentum": MOMENTUM, "damping": config.damping}
            windows, key = batch(config, text, run_key, step), jax.random.PRNGKey(step)  # nothing is drawn from it
            params, opt_state, seen = tx.step(state.params, state.opt_state, key, batch=windows, **given)
            state = State(params, opt_state, jnp.int32(step + 1), run_key)
            losses.append(seen["loss"])
        return state, jnp.stack(losses).mean()

    def evaluate(state: State) -> dict[str, float]:
        losses = [float(train_gpt.evaluate(model, state.params, windows)) for windows in held]
        return dict(zip(("train_loss", "val_loss"), losses, strict=True))

    plan = Plan(
        config.steps, config.eval_every, "tokens", config.batch * config.context, "Try a smaller rate or more damping."
    )
    with silenced():
        opt_state = tx.init(params, jax.random.PRNGKey(config.seed), batch(config, text, run_key, 0))
        state = State(params, opt_state, jnp.int32(0), run_key)
        return run_steps(plan, state, advance, evaluate, lambda row: "", began=began)[1]


@functools.partial(jax.jit, static_argnums=0)
def batch(config: Config, text: Any, run_key: Any, step: Any) -> Any:
    """The windows that `train_gpt.advance` draws for a step."""
    batch_key, _, _ = jax.random.split(jax.random.fold_in(run_key, step), 3)
    first = jax.random.randint(batch_key, (config.batch, 1), 0, text.size - config.context)
    return text[first + jnp.arange(config.context + 1)]


def make_optimizer(config: Config, corpus: Corpus) -> tuple[Any, Any]:
    """kfac-jax's optimizer of the GPT's loss, and the GPT."""
    kfac_jax, model = load_kfac_jax(), make_model(config, len(corpus.characters))

    def loss(params: Any, windows: Any) -> Any:
        logits, labels = flat(model.apply({"params": params}, windows[:, :-1]), windows[:, 1:])
        kfac_jax.register_softmax_cross_entropy_loss(logits, labels)
        return train_gpt.cross_entropy(logits, labels)

    return kfac_jax.Optimizer(jax.value_and_grad(loss), inverse_update_period=config.refresh, **SETTINGS), model
