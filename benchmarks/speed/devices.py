"""One device's part of an optimizer's step, with and without sharing the matrices out over a mesh.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.speed.devices 12 128 3 1 2 4 8

Parameters are whole on every device, as in data parallelism. `scaling` runs this and reads the last line.
Products are counted in the traced program, where a loop's body counts as often as it runs; collectives in the compiled
one, where none of these programs has any in a loop.
"""

import functools
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fisher_optax as fo
from benchmarks.harness import PERIOD, RATE, Run
from benchmarks.results import Column, spread
from benchmarks.speed.sized import Contender, Method, period, timed
from benchmarks.trees import Tree, layers_of, random_like

AXIS = "data"
PATIENCE = 10.0  # seconds after which a step is not repeated again
COLUMNS = {
    "step_ms": Column("ordinary step, ms", spread=True),
    "refresh_ms": Column("step that refreshes, ms", spread=True),
    "amortised_ms": Column("amortised, ms", spread=True),
    "gflop": Column("one device's products, GF"),
    "gflop_share": Column("of all products", ".0%"),
    "collectives": Column("collectives", "d"),
    "collective_mb": Column("one device's collectives, MB"),
    "state_mb": Column("one device's state, MB"),
    "state_share": Column("of all state", ".0%"),
    "memory_mb": Column("one device's temporaries and results, MB"),
    "memory_share": Column("of all of these", ".0%"),
    "compile_s": Column("compile, s", ".2g"),
}
SHARES = {"gflop_share": "gflop", "state_share": "state_mb", "memory_share": "memory_mb"}
METHODS = {
    "fo_muon": (lambda axis: fo.muon(RATE, mesh_axis=axis), None),
    "fo_soap": (
        lambda axis: fo.soap(RATE, precondition_frequency=PERIOD, storage=fo.Storage(mesh_axis=axis)),
        PERIOD,
    ),
}
COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(")
ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]")


class Collectives(NamedTuple):
    """Those of one run of a compiled program."""

    number: int
    bytes: int  # of their results on one device


def collectives(text: str) -> Collectives:
    """Those in the text of a compiled program, each run once."""
    found, total = COLLECTIVE.findall(text), 0
    for shapes, kind, began in found:
        arrays = ARRAY.findall(shapes)
        if began and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :]  # operands come before results
        total += sum(int(bits or 8) // 8 * math.prod(map(int, filter(None, dims.split(",")))) for bits, dims in arrays)
    return Collectives(len(found), total)


class Placed(NamedTuple):
    """A contender on so many devices."""

    contender: Contender
    grads: Any
    devices: int
    shared: bool

    def runs(self) -> dict[str, Run]:
        return {kind: lambda _, run=run: run(self.grads) for kind, run in self.contender.runs().items()}

    def gflop(self) -> float:
        """One device's products in an amortised step: a ``shard_map`` is counted once for each device."""
        return self.contender.gflop / (self.devices if self.shared else 1)

    def size(self) -> dict[str, Any]:
        """What is known of it without a clock."""
        program, state = self.contender.steps.programs[0], jax.tree.leaves(self.contender.state)
        memory: Any = program.run.memory_analysis()
        traffic = collectives(program.run.as_text() or "")
        mine = sum(x.addressable_shards[0].data.nbytes for x in state)
        return {
            "gflop": self.gflop(),
            "collectives": traffic.number,
            "collective_mb": traffic.bytes / 1e6,
            "state_mb": mine / 1e6,
            "memory_mb": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6,
            "compile_s": program.compile_s,
        }


def place(method: Method, tree: Any, devices: int, *, shared: bool) -> Placed:
    """The method on a mesh of so many devices, every one of which holds all parameters and gradients."""
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    everywhere = NamedSharding(mesh, PartitionSpec())
    params, grads = (jax.device_put(random_like(tree, seed), everywhere) for seed in range(2))
    with jax.set_mesh(mesh):
        return Placed(Contender(method, params), grads, devices, shared)


def rows(layers: int, width: int, repeats: int, counts: Sequence[int]) -> dict[str, dict[str, Any]]:
    """A row of each method on each number of devices, with the matrices shared out and with every device computing all.

    All take turns. Shares are of what one device alone would compute and keep.
    """
    tree, placed, alone = layers_of(Tree(layers, width)), dict[str, Placed](), dict[str, Placed]()
    for name, (build, refresh_at) in METHODS.items():
        for devices in sorted({1, *counts}):
            for axis, label in ((None, f"{name}_every"), (AXIS, name)):
                method = Method(functools.partial(build, axis), refresh_at)
                row = f"{label}_{devices}"
                placed[row] = place(method, tree, devices, shared=axis is not None)
                alone[row] = placed[f"{name}_every_1"]
                print(f"devices: {row} compiled", flush=True)
    runs = {f"{row} {kind}": run for row, one in placed.items() for kind, run in one.runs().items()}
    times = timed(runs, [None], repeats, PATIENCE, "devices")
    found = {}
    for row, one in placed.items():
        ms = {kind: spread([1e3 * t for t in times[f"{row} {kind}"]]) for kind in one.runs()}
        size, all_of_it = one.size(), alone[row].size()
        found[row] = {
            **{f"{kind}_ms": cell for kind, cell in ms.items()},
            "amortised_ms": period(ms),
            **size,
            **{share: size[of] / all_of_it[of] for share, of in SHARES.items()},
        }
    return found


if __name__ == "__main__":
    layers, width, repeats, *counts = map(int, sys.argv[1:])
    print(json.dumps(rows(layers, width, repeats, counts)))
