"""Optimizers whose ordinary and refreshing step are run, and counted, apart."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fisher_optax as fo
from benchmarks import harness
from benchmarks.flops import FACTORISATIONS, FlopCount, count_matmul_flops
from benchmarks.results import spread
from benchmarks.scaling_model import Product, Run
from benchmarks.steps import PERIOD, RATE
from benchmarks.trees import Tree, make_params
from fisher_optax.preconditioner.transform import MatrixState, PreconditionState

BLOCK = 128  # Shampoo's
ORDINARY = 1  # calls before a step that neither starts nor refreshes anything


class Method(NamedTuple):
    """An optimizer, and when it refreshes."""

    build: Callable[[], optax.GradientTransformation]
    refresh_at: int | None = None  # calls before a step that refreshes; None: no step does
    first: tuple[str, ...] = ()  # factorisations of the first step alone, or of singular factors
    block: int | None = None  # side of its matrices, where not the kernel's own
    exact: bool = True  # its products are float32's own, whatever the hardware offers

    def product(self, width: int, long: int) -> Product:
        """The one whose rate stands for those of the method on kernels of these sides."""
        m, n = (self.block, self.block) if self.block else (width, long)
        return Product(m, m, n, self.exact or jax.default_backend() == "cpu")


# SOAP and DyKAF use up their first call to start the bases, so that the tenth step is the eleventh call.
METHODS = {
    "adamw": Method(lambda: optax.adamw(RATE)),
    "optax_muon": Method(lambda: optax.contrib.muon(RATE), exact=False),
    "fo_muon": Method(lambda: fo.muon(RATE), exact=False),
    "fo_soap": Method(lambda: fo.soap(RATE, precondition_frequency=PERIOD), PERIOD, ("eigh",)),
    "fo_dykaf": Method(lambda: fo.dykaf(RATE, precondition_frequency=PERIOD), PERIOD, ("eigh",)),
    "fo_shampoo_128": Method(
        lambda: fo.shampoo(RATE, precondition_frequency=PERIOD, storage=fo.Storage(block_size=BLOCK)),
        PERIOD - 1,
        block=BLOCK,
    ),
}


def one_kernel(width: int) -> Any:
    """A square kernel, as ``jax.ShapeDtypeStruct``."""
    return {"layer": {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float32)}}


def gpt_layers(layers: int, width: int) -> Any:
    """Layers of a GPT, four kernels and two scales each, every one a leaf."""
    return {name: x for name, x in make_params(Tree(layers, width)).items() if name.startswith("block")}


def apart(build: Callable[[], optax.GradientTransformation]) -> optax.GradientTransformation:
    """``build()`` once a matrix, so that none is stacked with another, and once for the rest."""

    def of(tree: Any) -> optax.GradientTransformationExtraArgs:
        labels = jax.tree.map_with_path(lambda p, x: jax.tree_util.keystr(p) if len(x.shape) > 1 else "rest", tree)
        return optax.partition({label: build() for label in jax.tree.leaves(labels)}, labels)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return of(updates).update(updates, state, params)

    return optax.GradientTransformation(lambda params: of(params).init(params), update)


def with_count(state: Any, count: Any) -> Any:
    """The state as after ``count`` calls, as far as refreshes go by it."""
    return _each(PreconditionState, lambda s: s._replace(count=jnp.asarray(count, s.count.dtype)), state)


def begun(state: Any) -> Any:
    """With factors that are not zero, as after the step that starts them."""

    def plus_identity(x: Any) -> Any:
        square = x.ndim == 3 and x.shape[-1] == x.shape[-2]
        return x + jnp.eye(x.shape[-1], dtype=x.dtype) if square else x

    return _each(MatrixState, lambda s: s._replace(factors=jax.tree.map(plus_identity, s.factors)), state)


def _each(kind: type, change: Callable[[Any], Any], state: Any) -> Any:
    mine = lambda x: isinstance(x, kind)  # noqa: E731
    return jax.tree.map(lambda x: change(x) if mine(x) else x, state, is_leaf=mine)


class Contender:
    """A method compiled for a tree of arrays or their shapes, with state and parameters donated from step to step.

    It is compiled anew up to ``compiles`` times, for the times of that, if the first takes less than ``patience``.
    """

    def __init__(self, method: Method, params: Any, compiles: int = 1, patience: float = 0.0):
        tx = method.build()

        def step(grads: Any, state: Any, params: Any, count: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, with_count(state, count), params)
            return state, optax.apply_updates(params, updates)  # in the order of the arguments: see harness on donation

        if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
            params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        self.method, self.params = method, params
        self.state = jax.tree.map(jnp.copy, begun(tx.init(params)))  # no buffer twice, or it could not be donated
        given = (params, self.state, params, np.int32(0))
        self.counted = count_matmul_flops(step, *given)
        with harness.compiling_anew():
            self.programs = [harness.compile_program(step, *given, donate=(1, 2))]
            while len(self.programs) < compiles and self.programs[0].compile_s < patience:
                self.programs.append(harness.compile_program(step, *given, donate=(1, 2)))

    @property
    def compile_s(self) -> dict[str, Any]:
        return spread([program.compile_s for program in self.programs])

    @property
    def moved(self) -> int:
        """Bytes of gradients read, and of parameters and state read and written."""
        return 3 * harness.nbytes(self.params) + 2 * harness.nbytes(self.state)

    def step_after(self, grads: Any, count: int) -> Any:
        """A step that counts ``count`` calls before it."""
        self.state, self.params = self.programs[0].run(grads, self.state, self.params, np.int32(count))
        return self.state, self.params

    def runs(self) -> dict[str, Run]:
        """Its kinds of step."""
        runs, refresh_at = {"step": lambda grads: self.step_after(grads, ORDINARY)}, self.method.refresh_at
        return runs if refresh_at is None else {**runs, "refresh": lambda grads: self.step_after(grads, refresh_at)}

    def path(self, kind: str) -> FlopCount:
        """What a kind of step computes."""
        refreshes = kind == "refresh" or self.method.refresh_at is None
        path = self.counted.costliest(without=self.method.first if refreshes else FACTORISATIONS, loops=refreshes)
        if path is None:
            raise ValueError(f"no {kind} of this method is without {', '.join(self.method.first)}: see `Method.first`.")
        return path


def calls_of(contenders: Iterable[Contender]) -> list[str]:
    """The factorisations that the contenders call."""
    return sorted(sum((c.path(kind).factorisations for c in contenders for kind in c.runs()), Counter[str]()))


def over_period(each: Mapping[str, Any]) -> Any:
    """The mean of the steps of a period, one of them a "refresh" if there is one; of numbers, or of spreads.

    Example:
        >>> over_period({"step": 1.0, "refresh": 11.0})
        2.0
    """
    step, refresh = each["step"], each.get("refresh")
    if refresh is None:
        return step
    if not isinstance(step, Mapping):
        return step + (refresh - step) / PERIOD
    parts = {key: over_period({"step": step[key], "refresh": refresh[key]}) for key in ("median", "low", "high")}
    return {**parts, "n": min(step["n"], refresh["n"])}
