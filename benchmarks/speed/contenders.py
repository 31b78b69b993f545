"""The optimizers whose steps are timed: this project's, Optax's, and peers. Rows of one table, each compiled here."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

import fisher_optax as fo
from benchmarks.harness import PERIOD, RATE
from benchmarks.steps import Stepper, update_stepper
from benchmarks.trees import hidden
from experiments import peers
from experiments.soap_plain import scale_by_soap_plain

DECAY = 0.01
COMPILES = 7  # of each contender, in turns
PLAIN = scale_by_soap_plain(every=PERIOD)
AS_ADAMW = optax.add_decayed_weights(DECAY), optax.scale_by_learning_rate(RATE)
PATIENCE = 20.0  # seconds; what takes longer to compile is compiled once


class Row(NamedTuple):
    """An optimizer; ``build`` gets the type of the parameters."""

    label: str
    build: Callable[[Any], optax.GradientTransformation]
    plain_refresh: bool = False  # no factorisation tells its refresh from other steps: those take the cheapest path


def optax_muon(dtype: Any) -> optax.GradientTransformation:
    numbers = optax.contrib.MuonDimensionNumbers()
    dimensions = lambda params: jax.tree.map(lambda x: numbers if x else None, hidden(params))  # noqa: E731
    return optax.contrib.muon(RATE, weight_decay=DECAY, muon_weight_dimension_numbers=dimensions)


def of_matrices(build: Callable[[], optax.GradientTransformation]) -> Callable[[Any], Any]:
    """With AdamW for the rest, as our own methods have by themselves."""
    return lambda dtype: peers.on_hidden(build(), optax.adamw(RATE, weight_decay=DECAY))


def of_package(make: Callable[..., optax.GradientTransformation], **options: Any) -> Callable[[Any], Any]:
    return lambda dtype: make(RATE, weight_decay=DECAY, precondition_frequency=PERIOD, **options)


def of_peer(name: str) -> Row:
    build = of_matrices(lambda: peers.make(name, RATE, DECAY, PERIOD))
    return Row(peers.PEERS[name].label, build, name in ("psgdax", "optax_shampoo"))


BLOCKS = fo.Storage(block_size=128)
CONTENDERS = {
    "adamw": Row("`optax.adamw`", lambda dtype: optax.adamw(RATE, weight_decay=DECAY)),
    "optax_muon": Row("`optax.contrib.muon`", optax_muon),
    "fo_muon": Row("`fo.muon`", lambda dtype: fo.muon(RATE, weight_decay=DECAY, dtype=dtype)),
    "fo_soap": Row("`fo.soap`, every 10", of_package(fo.soap)),
    "fo_soap_staggered": Row("`fo.soap`, staggered", of_package(fo.soap, refresh="staggered")),
    "soap_plain": Row("SOAP leaf by leaf, QR", of_matrices(lambda: optax.chain(PLAIN, *AS_ADAMW))),
    "fo_dykaf": Row("`fo.dykaf`, every 10", of_package(fo.dykaf)),
    "fo_shampoo_128": Row("`fo.shampoo`, blocks of 128, every 10", of_package(fo.shampoo, storage=BLOCKS)),
    **{name: of_peer(name) for name in peers.PEERS},
}


def compile_row(row: Row, shapes: Any, dtype: Any) -> Stepper:
    """A contender for a tree of parameters' shapes.

    Raises:
        TypeError: its state changes type in the first step, so that its second would be another program.
    """
    stepper = update_stepper(row.build(dtype), shapes)
    after, _ = jax.eval_shape(stepper.step, shapes, *stepper.carried)
    if [x.dtype for x in jax.tree.leaves(after)] != [x.dtype for x in jax.tree.leaves(stepper.carried[0])]:
        raise TypeError(f"its state changes type in the first step with parameters in {dtype}")
    return stepper


def build(only: Sequence[str], shapes: Any, dtype: Any) -> tuple[dict[str, Stepper], dict[str, str]]:
    """The contenders that run here, compiled, and why the other ones do not.

    Peers come last: some make programs beside which everything compiles two or three times as slowly.
    """
    steppers, absent = dict[str, Stepper](), dict[str, str]()
    for of_peers in (False, True):
        group = [name for name in only if (name in peers.PEERS) is of_peers]
        for name in group:
            if reason := peers.absence(name) if of_peers else "":
                absent[name] = reason
                continue
            try:
                steppers[name] = compile_row(CONTENDERS[name], shapes, dtype)
            except Exception as error:
                if not of_peers:
                    raise
                # A peer may fail in any way, and not take the run along.
                absent[name] = f"does not run: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            print(f"{name}: {absent.get(name, 'compiled')}", flush=True)
        fast = [steppers[name] for name in group if name in steppers]
        fast = [stepper for stepper in fast if stepper.programs[0].compile_s < PATIENCE]
        for _, stepper in itertools.product(range(COMPILES - 1), fast):
            stepper.compile()
    return {name: steppers[name] for name in only if name in steppers}, absent
