"""One device's part of an optimizer's step, with and without sharing the matrices out over a mesh.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m benchmarks.speed.devices 12 128 1 1 2 4 8

Parameters are whole on every device, as in data parallelism. `scaling` runs this and reads the last line. Products are
counted in the traced program, where a loop's body counts as often as it runs and a ``shard_map`` on each device;
collectives in the compiled one, where none of these programs has any in a loop.
"""

import functools
import json
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fisher_optax as fo
from benchmarks import harness
from benchmarks.harness import PERIOD, RATE, WARM_UP
from benchmarks.results import columns, spread
from benchmarks.steps import Stepper, mean_flops, times_of, update_stepper
from benchmarks.trees import Tree, layers_of, random_like

AXIS = "data"
COLUMNS = columns(
    "step_ms: ordinary step, ms ±; refresh_ms: slowest of ten, ms ±; amortised_ms: mean of ten, ms ±;"
    "gflop: one device's products, GF; gflop_share: of all products | .0%; collectives: collectives | d;"
    "collective_mb: one device's collectives, MB; state_mb: one device's state, MB; state_share: of all state | .0%;"
    "compile_s: compile, s | .2g"
)
SHARES = {"gflop_share": "gflop", "state_share": "state_mb"}
SOAP = functools.partial(fo.soap, RATE, precondition_frequency=PERIOD)
METHODS = {
    "fo_muon": lambda axis: fo.muon(RATE, mesh_axis=axis),
    "fo_soap": lambda axis: SOAP(storage=fo.Storage(mesh_axis=axis)),
}
COLLECTIVE = re.compile(r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\(")
ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]")


def collectives(text: str) -> tuple[int, int]:
    """How many there are in the text of a compiled program, each run once, and the bytes of one device's results."""
    found, total = COLLECTIVE.findall(text), 0
    for shapes, kind, began in found:
        arrays = ARRAY.findall(shapes)
        if began and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :]  # operands come before results
        total += sum(int(bits or 8) // 8 * math.prod(map(int, filter(None, dims.split(",")))) for bits, dims in arrays)
    return len(found), total


def place(tx: optax.GradientTransformation, tree: Any, devices: int) -> Stepper:
    """An optimizer on a mesh of so many devices, every one of which holds all parameters and gradients."""
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    everywhere = NamedSharding(mesh, PartitionSpec())
    params, grads = (jax.device_put(random_like(tree, seed), everywhere) for seed in range(2))
    with jax.set_mesh(mesh):
        return update_stepper(tx, params, grads)


def size(stepper: Stepper, shared_by: int) -> dict[str, Any]:
    """What is known of one device's part without a clock."""
    program, state = stepper.programs[0], jax.tree.leaves(stepper.carried[0])
    number, traffic = collectives(program.run.as_text() or "")
    return {
        "gflop": mean_flops(stepper.flops) / 1e9 / shared_by,
        "collectives": number,
        "collective_mb": traffic / 1e6,
        "state_mb": sum(x.addressable_shards[0].data.nbytes for x in state) / 1e6,
        "compile_s": program.compile_s,
    }


def rows(layers: int, width: int, repeats: int, counts: Sequence[int]) -> dict[str, dict[str, Any]]:
    """A row of each method on each number of devices, with the matrices shared out and with every device computing all.

    All take turns. Shares are of what one device alone would compute and keep.
    """
    tree, steppers, found = layers_of(Tree(layers, width)), dict[str, Stepper](), dict[str, dict[str, Any]]()
    for name, build in METHODS.items():
        for devices in sorted({1, *counts}):
            for axis, label in ((None, f"{name}_every"), (AXIS, name)):
                row = f"{label}_{devices}"
                steppers[row] = place(build(axis), tree, devices)
                cells = size(steppers[row], devices if axis else 1)
                alone = found.get(f"{name}_every_1", cells)
                found[row] = cells | {share: cells[of] / alone[of] for share, of in SHARES.items()}
                print(f"devices: {row} compiled", flush=True)
    runs = {row: lambda _, stepper=stepper: stepper(stepper.given) for row, stepper in steppers.items()}
    for row, seconds in harness.interleaved(runs, WARM_UP + PERIOD * repeats, lambda i: i).items():
        names = {"step": "step_ms", "slowest": "refresh_ms", "mean": "amortised_ms"}
        found[row] |= {names[kind]: spread(ms) for kind, ms in times_of(seconds[WARM_UP:]).items()}
    return found


if __name__ == "__main__":
    layers, width, repeats, *counts = map(int, sys.argv[1:])
    print(json.dumps(rows(layers, width, repeats, counts)))
