"""The optimizers whose steps are timed: this project's, Optax's, and peers. Rows of one table, each compiled here."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fisher_optax as fo
from benchmarks import harness, peers
from benchmarks.flops import count_matmul_flops
from benchmarks.results import spread
from benchmarks.soap_plain import scale_by_soap_plain
from benchmarks.steps import PERIOD, RATE, flops_between_refreshes, mean_flops
from benchmarks.trees import hidden

DECAY = 0.01
COMPILES = 7  # of each contender, in turns
PATIENCE = 20.0  # seconds; what takes longer to compile is compiled once


class Row(NamedTuple):
    """An optimizer; ``build`` gets the type of the parameters."""

    label: str
    build: Callable[[Any], optax.GradientTransformation]
    exact: Callable[[Any], bool] = lambda dtype: True  # its products are float32's own, whatever the hardware offers
    plain_refresh: bool = False  # no factorisation tells its refresh from other steps: those take the cheapest path
    note: str = ""


def optax_muon(dtype: Any) -> optax.GradientTransformation:
    numbers = optax.contrib.MuonDimensionNumbers()

    def dimensions(params: Any) -> Any:
        return jax.tree.map(lambda is_hidden: numbers if is_hidden else None, hidden(params))

    return optax.contrib.muon(RATE, weight_decay=DECAY, muon_weight_dimension_numbers=dimensions)


def fo_muon(dtype: Any) -> optax.GradientTransformation:
    return fo.muon(RATE, weight_decay=DECAY, dtype=dtype)


def soap_plain(dtype: Any) -> optax.GradientTransformation:
    matrices = optax.chain(
        scale_by_soap_plain(every=PERIOD), optax.add_decayed_weights(DECAY), optax.scale_by_learning_rate(RATE)
    )
    return peers.on_hidden(matrices, optax.adamw(RATE, weight_decay=DECAY))


def of_package(make: Callable[..., optax.GradientTransformation], **options: Any) -> Callable[[Any], Any]:
    return lambda dtype: make(RATE, weight_decay=DECAY, precondition_frequency=PERIOD, **options)


def of_peer(name: str) -> Row:
    def build(dtype: Any) -> optax.GradientTransformation:
        return peers.on_hidden(peers.make(name, RATE, DECAY, PERIOD), optax.adamw(RATE, weight_decay=DECAY))

    peer = peers.PEERS[name]
    return Row(peer.label, build, lambda dtype: False, name in ("psgdax", "optax_shampoo"), peer.note)


CONTENDERS = {
    "adamw": Row("`optax.adamw`", lambda dtype: optax.adamw(RATE, weight_decay=DECAY)),
    "optax_muon": Row("`optax.contrib.muon`", optax_muon, lambda dtype: False),
    "fo_muon": Row("`fo.muon`", fo_muon, lambda dtype: dtype == jnp.float32),
    "fo_soap": Row("`fo.soap`, every 10", of_package(fo.soap)),
    "fo_soap_staggered": Row("`fo.soap`, staggered", of_package(fo.soap, refresh="staggered")),
    "soap_plain": Row("SOAP leaf by leaf, QR", soap_plain),
    "fo_dykaf": Row("`fo.dykaf`, every 10", of_package(fo.dykaf)),
    "fo_shampoo_128": Row(
        "`fo.shampoo`, blocks of 128, every 10", of_package(fo.shampoo, storage=fo.Storage(block_size=128))
    ),
    **{name: of_peer(name) for name in peers.PEERS},
}


class Contender:
    """A row compiled for a tree, with the parameters and the state it has reached."""

    def __init__(self, row: Row, shapes: Any, dtype: Any):
        self.row, self.shapes, self.steps_a_call = row, shapes, 1
        self.tx = row.build(dtype)
        self.params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        self.state = jax.tree.map(jnp.copy, self.tx.init(self.params))  # no buffer twice, or it could not be donated
        after, _ = jax.eval_shape(self.step, shapes, self.state, shapes)
        if [x.dtype for x in jax.tree.leaves(after)] != [x.dtype for x in jax.tree.leaves(self.state)]:
            raise TypeError(f"its state changes type in the first step with parameters in {dtype}")
        self.flops = count_matmul_flops(self.step, shapes, self.state, shapes)
        self.exact = row.exact(dtype)
        self.trace_s: list[float] = []
        self.compile_s: list[float] = []
        self.program = self.compile()
        self.lines = {"stablehlo_lines": self.program.stablehlo_lines, "hlo_lines": self.program.hlo_lines}

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        # Results in the order of the arguments: JAX hands donated buffers to results of their shape in that order,
        # and parameters written where a momentum was would first be copied.
        updates, state = self.tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    def steps(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        """`PERIOD` of them in one program."""

        def one(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            # Behind the barrier the gradient seems to change: what depends on it alone stays inside the loop.
            held, _ = jax.lax.optimization_barrier((grads, i))
            return self.step(held, *carry)

        return jax.lax.fori_loop(0, PERIOD, one, (state, params))

    def compile(self) -> harness.Program:
        """The step, compiled anew; what that took is kept."""
        program = harness.compile_program(self.step, self.shapes, self.state, self.params, donate=(1, 2))
        self.trace_s.append(program.trace_s)
        self.compile_s.append(program.compile_s)
        return program

    def join_steps(self) -> None:
        """From now on a call takes `PERIOD` steps: a single one is over before Python can start the next."""
        self.steps_a_call = PERIOD
        self.program = harness.compile_program(self.steps, self.shapes, self.state, self.params, donate=(1, 2))

    def __call__(self, grads: Any) -> Any:
        self.state, self.params = self.program.run(grads, self.state, self.params)
        return self.params, self.state

    @property
    def between_flops(self) -> int:
        """Of the matrix products of a step that refreshes nothing."""
        return self.flops.least if self.row.plain_refresh else flops_between_refreshes(self.flops)

    @property
    def mean_flops(self) -> float | None:
        """Of the products, refreshes spread over all steps; None where a loop's length is not in the program."""
        if self.flops.unread_loops:
            return None
        return mean_flops(self.flops, self.between_flops)

    def size(self) -> dict[str, Any]:
        """What is known of it beside its times."""
        mean = self.mean_flops
        return {
            "compile_s": spread(self.compile_s),
            "trace_s": spread(self.trace_s),
            **self.lines,
            "state": harness.nbytes(self.state) / harness.nbytes(self.params),
            "step_gflop": self.between_flops / 1e9,
            "mean_gflop": None if mean is None else mean / 1e9,
            "note": self.row.note or None,
        }


def build(only: Sequence[str], shapes: Any, dtype: Any) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that run here, compiled, and why the other ones do not.

    Peers come last: some make programs beside which everything compiles two or three times as slowly.
    """
    contenders, absent = {}, {}
    for of_peers in (False, True):
        group = [name for name in only if (name in peers.PEERS) is of_peers]
        for name in group:
            made = attempt(name, shapes, dtype)
            (absent if isinstance(made, str) else contenders)[name] = made
            print(f"{name}: {made if isinstance(made, str) else 'compiled'}", flush=True)
        fast = [contenders[name] for name in group if name in contenders]
        fast = [contender for contender in fast if contender.compile_s[0] < PATIENCE]
        for _, contender in itertools.product(range(COMPILES - 1), fast):
            contender.compile()
    return {name: contenders[name] for name in only if name in contenders}, absent


def attempt(name: str, shapes: Any, dtype: Any) -> Contender | str:
    """A contender, or why it does not run here."""
    if name not in peers.PEERS:
        return Contender(CONTENDERS[name], shapes, dtype)
    if reason := peers.absence(name):
        return reason
    try:
        return Contender(CONTENDERS[name], shapes, dtype)
    except Exception as error:  # a peer may fail in any way, and not take the run along
        first, *_ = str(error).split("\n")
        return f"does not run: {type(error).__name__}: {first}"
