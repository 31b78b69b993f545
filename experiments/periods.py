"""Training for one period between refreshes at a time: what a step's time is measured on."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import train_gpt, train_images
from experiments.gpt_config import Config
from experiments.image_batches import scale_of, shuffled
from experiments.images import Images
from experiments.text import Corpus


def of_gpt(config: Config, corpus: Corpus) -> Callable[[Any], Any]:
    """A function that trains on for one period; the first call compiles."""
    config = config.resolve()
    program, model = train_gpt.program_of(config), train_gpt.make_model(config, len(corpus.characters))
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    params = train_gpt.initial_params(model, init_key)
    state = train_gpt.State(params, train_gpt.initial_moments(program, params), jnp.int32(0), run_key)
    text, peak = jnp.asarray(corpus.train), jnp.float32(config.lr)
    stops = itertools.count(config.refresh, config.refresh)

    def train(_: Any) -> Any:
        nonlocal state
        state, loss = train_gpt.advance(program, model, state, text, jnp.int32(next(stops)), peak)
        return loss

    return train


def of_images(config: Any, data: Images) -> Callable[[Any], Any]:
    """The same for images."""
    images, labels = (jnp.asarray(array) for array in data.train)
    program, scale, peak = train_images.make_program(config, data), scale_of(data.train), jnp.float32(config.lr)
    state = train_images.initial_state(program, images.shape[1:], jax.random.key(config.seed))
    order = shuffled(state.key, jnp.int32(0), len(labels))

    def train(_: Any) -> Any:
        nonlocal state
        loss = None
        for _ in range(config.refresh):
            state, loss = train_images.advance(program, state, images, labels, order, scale, peak)
        return loss

    return train
