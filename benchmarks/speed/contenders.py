"""The optimizers whose steps are timed: this project's, Optax's, and peers. Rows of one table, each compiled here."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fisher_optax as fo
from benchmarks import harness
from benchmarks.harness import PERIOD, RATE
from benchmarks.steps import mean_flops, ordinary, update_stepper
from benchmarks.trees import hidden
from experiments import peers
from experiments.soap_plain import scale_by_soap_plain

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


def of_matrices(build: Callable[[], optax.GradientTransformation]) -> Callable[[Any], Any]:
    """With AdamW for the rest, as our own methods have by themselves."""
    return lambda dtype: peers.on_hidden(build(), optax.adamw(RATE, weight_decay=DECAY))


def soap_plain() -> optax.GradientTransformation:
    decay, rate = optax.add_decayed_weights(DECAY), optax.scale_by_learning_rate(RATE)
    return optax.chain(scale_by_soap_plain(every=PERIOD), decay, rate)


def of_package(make: Callable[..., optax.GradientTransformation], **options: Any) -> Callable[[Any], Any]:
    return lambda dtype: make(RATE, weight_decay=DECAY, precondition_frequency=PERIOD, **options)


def of_peer(name: str) -> Row:
    build, peer = of_matrices(lambda: peers.make(name, RATE, DECAY, PERIOD)), peers.PEERS[name]
    return Row(peer.label, build, lambda dtype: False, name in ("psgdax", "optax_shampoo"), peer.note)


CONTENDERS = {
    "adamw": Row("`optax.adamw`", lambda dtype: optax.adamw(RATE, weight_decay=DECAY)),
    "optax_muon": Row("`optax.contrib.muon`", optax_muon, lambda dtype: False),
    "fo_muon": Row(
        "`fo.muon`", lambda dtype: fo.muon(RATE, weight_decay=DECAY, dtype=dtype), lambda dtype: dtype == jnp.float32
    ),
    "fo_soap": Row("`fo.soap`, every 10", of_package(fo.soap)),
    "fo_soap_staggered": Row("`fo.soap`, staggered", of_package(fo.soap, refresh="staggered")),
    "soap_plain": Row("SOAP leaf by leaf, QR", of_matrices(soap_plain)),
    "fo_dykaf": Row("`fo.dykaf`, every 10", of_package(fo.dykaf)),
    "fo_shampoo_128": Row(
        "`fo.shampoo`, blocks of 128, every 10", of_package(fo.shampoo, storage=fo.Storage(block_size=128))
    ),
    **{name: of_peer(name) for name in peers.PEERS},
}


class Contender:
    """A row compiled for a tree, with the parameters and the state it has reached."""

    def __init__(self, row: Row, shapes: Any, dtype: Any):
        self.row, self.exact, self.steps_a_call = row, row.exact(dtype), 1
        self.alone = self.runs = update_stepper(row.build(dtype), shapes)
        state, params = self.alone.carried
        self.state_share = harness.nbytes(state) / harness.nbytes(params)
        after, _ = jax.eval_shape(self.alone.step, shapes, state, params)
        if [x.dtype for x in jax.tree.leaves(after)] != [x.dtype for x in jax.tree.leaves(state)]:
            raise TypeError(f"its state changes type in the first step with parameters in {dtype}")

    def join_steps(self) -> None:
        """From now on a call takes `PERIOD` steps: a single one is over before Python can start the next."""
        step, self.steps_a_call = self.alone.step, PERIOD

        def steps(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            def body(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                # Behind the barrier the gradient seems to change: what depends on it alone stays inside the loop.
                fresh, _ = jax.lax.optimization_barrier((grads, i))
                return step(fresh, *carry)

            return jax.lax.fori_loop(0, PERIOD, body, (state, params))

        self.runs = type(self.alone)(steps, self.alone.given, *self.alone.carried)

    def __call__(self, grads: Any) -> Any:
        return self.runs(grads)

    @property
    def between_flops(self) -> int:
        """Of the matrix products of a step that refreshes nothing."""
        return self.alone.flops.least if self.row.plain_refresh else ordinary(self.alone.flops).products

    @property
    def mean_flops(self) -> float | None:
        """Of the products, refreshes spread over all steps; None where a loop's length is not in the program."""
        return None if self.alone.flops.unread_loops else mean_flops(self.alone.flops, self.between_flops)

    def size(self) -> dict[str, Any]:
        """What is known of it beside its times."""
        return {
            **self.alone.compiling(),
            "state": self.state_share,
            "step_gflop": self.between_flops / 1e9,
            "mean_gflop": None if self.mean_flops is None else self.mean_flops / 1e9,
            "note": self.row.note or None,
        }


def build(only: Sequence[str], shapes: Any, dtype: Any) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that run here, compiled, and why the other ones do not.

    Peers come last: some make programs beside which everything compiles two or three times as slowly.
    """
    contenders, absent = dict[str, Contender](), dict[str, str]()
    for of_peers in (False, True):
        group = [name for name in only if (name in peers.PEERS) is of_peers]
        for name in group:
            if reason := peers.absence(name) if of_peers else "":
                absent[name] = reason
                continue
            try:
                contenders[name] = Contender(CONTENDERS[name], shapes, dtype)
            except Exception as error:
                if not of_peers:
                    raise
                # A peer may fail in any way, and not take the run along.
                absent[name] = f"does not run: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(f"{name}: {absent.get(name, 'compiled')}", flush=True)
        fast = [contenders[name].alone for name in group if name in contenders]
        fast = [alone for alone in fast if alone.programs[0].compile_s < PATIENCE]
        for _, alone in itertools.product(range(COMPILES - 1), fast):
            alone.compile()
    return {name: contenders[name] for name in only if name in contenders}, absent
