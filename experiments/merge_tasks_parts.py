"""What `merge_tasks.py` measures: two models tuned from one, what merging makes of them, on images none has seen.

Every method has one number, chosen on validation images: the share of the second task among `SHARES` (of averages), or
the scale of what is added to the base among `SCALES`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import fisher_optax as fo
from experiments.image_batches import scale_of, standardize
from experiments.images import Images
from experiments.loop import require_finite
from experiments.models.cnn import CNN

BATCH, RATE, AT_ONCE = 64, 2e-3, 32
TASKS = {
    "distortions": ("turned by a quarter", "as a negative"),
    "classes": ("of the lower classes", "of the upper classes"),
}
SHARES = np.linspace(0, 1, 21)
SCALES = np.linspace(0.1, 1.6, 16)
STAGES = 6  # of a seed, for the progress bar

Part = tuple[Array, Array]  # images, labels
Params = Any
Say = Callable[[str], object]  # called when a stage begins


class Tasks(NamedTuple):
    """Images to train on, to choose by and to test on; of the base, and of each task."""

    base: Part
    train: tuple[Part, Part]
    validation: tuple[Part, Part]
    test: tuple[Part, Part]


def make_tasks(data: Images, kind: str) -> Tasks:
    """A fifth of the training images is held out for validation."""
    scale = scale_of(data.train)
    (images, labels), test = ((standardize(jnp.asarray(x), scale), jnp.asarray(y)) for x, y in (data.train, data.test))
    held = np.arange(len(labels)) % 5 == 4
    train, validation = (images[~held], labels[~held]), (images[held], labels[held])
    both = functools.partial(split, kind, (data.classes + 1) // 2)
    return Tasks(train, both(*train), both(*validation), both(*test))


def split(kind: str, half: int, images: Array, labels: Array) -> tuple[Part, Part]:
    """The same images in two ways, or one half of them each."""
    if kind == "distortions":
        return (jnp.rot90(images, 1, (1, 2)), labels), (-images, labels)
    low = np.asarray(labels) < half
    return (images[low], labels[low]), (images[~low], labels[~low])


class Program:
    """What is compiled once for all seeds."""

    def __init__(self, classes: int):
        self.model, self.tx = CNN(classes), optax.adam(RATE)
        self.fit = jax.jit(self._fit, static_argnames="epochs")
        self.accuracies = jax.jit(jax.vmap(self._accuracy, (0, None)))

    def loss(self, params: Params, images: Array, labels: Array) -> Array:
        return fo.losses.softmax_cross_entropy(jnp.asarray(self.model.apply({"params": params}, images)), labels)

    def example_loss(self, params: Params, example: Part) -> Array:
        return self.loss(params, example[0][None], example[1][None])

    def _accuracy(self, params: Params, part: Part) -> Array:
        logits = jnp.asarray(self.model.apply({"params": params}, part[0]))
        return jnp.mean(logits.argmax(-1) == part[1])

    def _fit(self, params: Params, part: Part, key: Array, epochs: int) -> tuple[Params, Array]:
        """Adam from these parameters, and the mean loss of the last epoch."""
        count = len(part[1])
        batch = min(BATCH, count)
        order = jax.vmap(lambda k: jax.random.permutation(k, count))(jax.random.split(key, epochs))
        steps = order[:, : count // batch * batch].reshape(-1, batch)

        def step(carry: Any, chosen: Array) -> tuple[Any, Array]:
            params, state = carry
            value, grads = jax.value_and_grad(self.loss)(params, part[0][chosen], part[1][chosen])
            updates, state = self.tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        (params, _), losses = jax.lax.scan(step, (params, self.tx.init(params)), steps)
        return params, jnp.mean(losses[-(count // batch) :])


class Models(NamedTuple):
    """Of one seed."""

    base: Params
    tuned: tuple[Params, Params]
    fishers: tuple[Any, Any]  # diagonals of the tuned ones, each on its own task
    key: Array


def train(program: Program, tasks: Tasks, config: Any, seed: int, say: Say) -> Models:
    key = jax.random.key(seed)
    keys = jax.random.split(key, 6)

    def fitted(what: str, params: Params, part: Part, key: Array, epochs: int) -> Params:
        say(what)
        params, loss = program.fit(params, part, key, epochs=epochs)
        require_finite(loss, f"in the last epoch of {what}, seed {seed}", "Look at the data.")
        return params

    start = jax.jit(program.model.init)(keys[0], tasks.base[0][:1])["params"]
    base = fitted("the base", start, tasks.base, keys[1], config.base_epochs)
    names = TASKS[config.tasks]
    tuned = [fitted(names[i], base, tasks.train[i], keys[2 + i], config.epochs) for i in range(2)]
    fishers = []
    for i in range(2):
        say(f"Fisher of task {i + 1}")
        batch = tuple(x[: config.examples] for x in tasks.train[i])
        found = fo.fisher.diagonal(
            program.example_loss, tuned[i], [batch], fisher=config.fisher, microbatch=AT_ONCE,
            key=keys[4] if config.fisher == "mc" else None,
        )  # fmt: skip
        fishers.append(found.mean)
    return Models(base, (tuned[0], tuned[1]), (fishers[0], fishers[1]), keys[5])


def methods(config: Any) -> dict[str, tuple[Callable[[Models, Array], Params], np.ndarray]]:
    """By name: parameters from the models and a number, and the numbers to choose from."""
    merge, add, ties = fo.compression.merge, fo.compression.add_task_vectors, fo.compression.ties
    vectors = lambda m: [fo.compression.task_vector(m.base, tuned) for tuned in m.tuned]  # noqa: E731
    weigh = lambda m, λ: add(m.base, vectors(m), scale=2 * λ, fishers=m.fishers, normalize=True)  # noqa: E731
    same = lambda m: [jax.tree.map(jnp.ones_like, m.base)] * 2  # noqa: E731

    def thinned(m: Models) -> list[Any]:
        return [fo.compression.dare(jax.random.fold_in(m.key, i), v, config.drop) for i, v in enumerate(vectors(m))]

    def weighted(normalize: bool) -> Callable[[Models, Array], Params]:
        share = lambda c: jnp.stack([1 - c, c])  # noqa: E731
        return lambda m, c: merge(m.tuned, m.fishers, coefficients=share(c), normalize=normalize).params

    one = np.zeros(1)
    return {
        "base": (lambda m, _: m.base, one),
        "tuned on task 1": (lambda m, _: m.tuned[0], one),
        "tuned on task 2": (lambda m, _: m.tuned[1], one),
        "average": (lambda m, c: merge(m.tuned, same(m), coefficients=jnp.stack([1 - c, c])).params, SHARES),
        "Fisher-weighted average": (weighted(True), SHARES),
        "Fisher-weighted average, scales kept": (weighted(False), SHARES),
        "task arithmetic": (lambda m, λ: add(m.base, vectors(m), scale=λ), SCALES),
        "task arithmetic, Fisher": (weigh, SCALES),
        "TIES": (lambda m, λ: ties(m.base, vectors(m), config.density, λ), SCALES),
        "DARE + TIES": (lambda m, λ: ties(m.base, thinned(m), 1.0, λ), SCALES),
    }  # fmt: skip


def sweeps(config: Any) -> dict[str, Callable[[Models, Array], Params]]:
    """The methods compiled, for all numbers at once."""
    return {name: jax.jit(jax.vmap(make, (None, 0))) for name, (make, _) in methods(config).items()}


def measure(program: Program, compiled: Any, tasks: Tasks, config: Any, seed: int, say: Say) -> dict[str, Any]:
    """Of one seed, as JSON values: accuracies on both tasks by method, for the number chosen and along all of them."""
    models = train(program, tasks, config, seed, say)
    say("merging")
    found: dict[str, Any] = {}
    for name, (_, numbers) in methods(config).items():
        params = compiled[name](models, jnp.asarray(numbers, jnp.float32))
        on = lambda parts: np.stack([program.accuracies(params, part) for part in parts], -1)  # noqa: E731, B023
        validation, test = on(tasks.validation), on(tasks.test)
        best = int(np.argmax(validation.mean(-1)))
        middle = int(np.abs(numbers - 0.5).argmin())
        found[name] = {
            "number": float(numbers[best]) if len(numbers) > 1 else None,
            "test": test[best].tolist(),
            "at one half": test[middle].tolist(),
            "numbers": numbers.tolist(),
            "path": test.tolist(),
        }
    traces = [float(sum(jnp.sum(x) for x in jax.tree.leaves(F))) for F in models.fishers]
    return {"seed": seed, "traces": traces, "methods": found}
