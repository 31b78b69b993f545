"""What a step of an optimizer costs as kernels widen, layers are added and devices share the work.

    python -m benchmarks scaling

Widths: one square kernel. Layers: those of a GPT, four kernels and two scales each, every one a leaf. Devices: the
same layers, the matrices shared out over a mesh (``mesh_axis=``) or not; on a CPU the devices are threads that share
its cores, so what counts there is one device's part of the work, not the time. A step is ``tx.update`` and
``optax.apply_updates``, float32, state and parameters donated; ten are a repeat, in which the median is the ordinary
step, the slowest refreshes, and the mean is the amortised one.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from matplotlib.figure import Figure

from benchmarks import harness, pictures
from benchmarks.catalogue import listed, positive
from benchmarks.harness import PERIOD, WARM_UP
from benchmarks.results import columns, result, spread, table
from benchmarks.speed import devices
from benchmarks.speed.contenders import CONTENDERS
from benchmarks.steps import Stepper, mean_flops, times_of, update_stepper
from benchmarks.trees import Tree, layers_of, random_like

COMPILES = 3  # of a program that is quick to compile; the median counts
APART = "fo_muon_apart"
METHODS = ["adamw", "optax_muon", "fo_muon", "fo_soap", "fo_dykaf", "fo_shampoo_128"]
TIMES = columns(
    "step_ms: ordinary step, ms ±; refresh_ms: step that refreshes, ms ±; amortised_ms: amortised, ms ±;"
    "gflop: products, GF; over_adamw: times AdamW | .1f; compile_s: compile, s | .2g ±; trace_s: trace, s | .2g"
)
TABLES = {
    "width": ("One square kernel: method_width", TIMES),
    "layers": (f"Layers of a GPT: method_layers; {APART}: every leaf a stack of its own", TIMES),
    "devices": ("Layers of a GPT: method_devices; method_every_devices: each device computes all", devices.COLUMNS),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = listed(of=int)
    parser.add_argument("--widths", type=sizes, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--layers", type=sizes, default=[1, 2, 4, 8, 16, 32, 64, 96])
    parser.add_argument("--layer-width", type=positive, default=128)
    parser.add_argument("--devices", type=sizes, default=[1, 2, 4, 8])
    parser.add_argument("--device-layers", type=positive, default=12)
    parser.add_argument("--methods", type=listed(METHODS), default=METHODS, help=", ".join(METHODS))
    parser.add_argument("--repeats", type=positive, default=1, help="tens of steps that are timed (%(default)s)")
    parser.add_argument("--patience", type=float, default=15.0, help="seconds to compile that are left to a method")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    platform, left_out = harness.environment()["platform"], dict[str, str]()
    found: dict[str, dict[str, Any]] = {key: {} for key in TABLES}
    methods = {name: CONTENDERS[name].build for name in options.methods}

    def so_far() -> dict[str, Any]:
        what = "Cost of an optimizer's step against the width of a kernel and the number of layers and devices."
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "command")}
        tables = {key: table(*TABLES[key], rows) for key, rows in found.items()}
        return result(f"scaling_{platform}", what, options.command, tables, settings={**settings, "left_out": left_out})

    for width in options.widths:
        kernel = {"layer": {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float32)}}
        steppers = {name: update_stepper(build(jnp.float32), kernel) for name, build in methods.items()}
        found["width"] |= rows_of("width", width, steppers, kernel, options.repeats)
        yield so_far()
    if "fo_muon" in methods:
        methods[APART] = lambda dtype: apart(lambda: CONTENDERS["fo_muon"].build(dtype))
    for layers in options.layers:
        tree = layers_of(Tree(layers, options.layer_width))
        steppers = on_layers(methods, tree, layers, options.patience, left_out)
        found["layers"] |= rows_of("layers", layers, steppers, tree, options.repeats)
        yield so_far()
    if options.devices:
        found["devices"] = on_devices(options, platform)
        yield so_far()


def apart(build: Callable[[], optax.GradientTransformation]) -> optax.GradientTransformation:
    """``build()`` once a matrix, so that none is stacked with another, and once for the rest."""

    def of(tree: Any) -> optax.GradientTransformationExtraArgs:
        labels = jax.tree.map_with_path(lambda p, x: jax.tree_util.keystr(p) if len(x.shape) > 1 else "rest", tree)
        return optax.partition({label: build() for label in jax.tree.leaves(labels)}, labels)

    update = lambda updates, state, params=None: of(updates).update(updates, state, params)  # noqa: E731
    return optax.GradientTransformation(lambda params: of(params).init(params), update)


def on_layers(
    methods: Mapping[str, Any], tree: Any, layers: int, patience: float, left_out: dict[str, str]
) -> dict[str, Stepper]:
    """The methods on so many layers, but for those that took too long to compile on fewer."""
    steppers = {}
    for name in (name for name in methods if name not in left_out):
        with harness.compiling_anew():
            stepper = steppers[name] = update_stepper(methods[name](jnp.float32), tree)
            seconds = stepper.programs[0].compile_s
            while len(stepper.programs) < COMPILES and seconds < patience / 10:
                stepper.compile()
        print(f"{layers} layers: {name} compiled in {seconds:.1f} s", flush=True)
        if seconds > patience:
            left_out[name] = f"on more than {layers} layers, which took {seconds:.0f} s to compile"
    return steppers


def rows_of(part: str, size: int, steppers: Mapping[str, Stepper], tree: Any, repeats: int) -> dict[str, Any]:
    """A row of each contender; all take turns."""
    inputs = [jax.block_until_ready(random_like(tree, seed)) for seed in range(2)]
    rounds = WARM_UP + PERIOD * repeats
    times = harness.interleaved(steppers, rounds, lambda i: inputs[i % 2], f"{part} {size}: step")
    rows = {name: row(stepper, times[name][WARM_UP:]) for name, stepper in steppers.items()}
    if "adamw" in rows:
        for cells in rows.values():
            cells["over_adamw"] = cells["amortised_ms"]["median"] / rows["adamw"]["amortised_ms"]["median"]
    return {f"{name}_{size}": cells for name, cells in rows.items()}


def row(stepper: Stepper, seconds: list[float]) -> dict[str, Any]:
    """A method that never refreshes has one kind of step."""
    ms = {kind: spread(values) for kind, values in times_of(seconds).items()}
    cells = {"step_ms": ms["step"], "amortised_ms": ms["mean" if stepper.refreshes else "step"]}
    cells |= {"refresh_ms": ms["slowest"]} if stepper.refreshes else {}
    return {**cells, "gflop": mean_flops(stepper.flops) / 1e9, **stepper.compiling()}


def on_devices(options: argparse.Namespace, platform: str) -> dict[str, Any]:
    """On a CPU in a process of its own, which takes it for as many devices; elsewhere those that there are."""
    sizes, counts = (options.device_layers, options.layer_width, options.repeats), options.devices
    if platform != "cpu":
        return devices.rows(*sizes, [k for k in counts if k <= jax.device_count()])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(counts)}"
    command = [sys.executable, "-m", "benchmarks.speed.devices", *map(str, (*sizes, *counts))]
    # A factorisation with threads of its own in each of the devices would only be in the others' way.
    around = {**os.environ, "XLA_FLAGS": flags.strip(), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=around, stdout=subprocess.PIPE, text=True) as process:
        *_, last = (print(line, end="", flush=True) or line for line in process.stdout or ())
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return json.loads(last)


def draw(found: dict[str, Any]) -> Figure:
    """Times against width and layers, compile times against layers, and one device's part."""
    figure = Figure(figsize=(12, 8.8), layout="constrained")
    panels, rows = figure.subplots(2, 2).ravel(), {key: part["rows"] for key, part in found["tables"].items()}
    layers, colors = f"layers of a GPT, width {found['settings']['layer_width']}", [*METHODS, APART]
    for axes, part, column, title, x, y in (
        (panels[0], "width", "amortised_ms", "One square kernel", "width", "amortised step, ms"),
        (panels[1], "layers", "amortised_ms", "Unrolled layers", layers, "amortised step, ms"),
        (panels[2], "layers", "compile_s", "Unrolled layers: compiling", layers, "compile time, s"),
        (panels[3], "devices", "gflop_share", "", "", ""),
        (panels[3], "devices", "state_share", "Matrices shared out", "devices", "products; dashed: state"),
    ):
        for i, name in enumerate(colors):
            cells = {float(key.rpartition("_")[2]): row.get(column) for key, row in rows[part].items()
                     if key.rpartition("_")[0] == name}  # fmt: skip
            if sizes := sorted(size for size, cell in cells.items() if cell is not None):
                style = "s--" if column == "state_share" else "o-"
                pictures.line(axes, sizes, [cells[x] for x in sizes], style, color=f"C{i}", label=name, markersize=4)
        axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale="log")
        pictures.plain_ticks(axes, sorted({size for line in axes.get_lines() for size in line.get_xdata()}))
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure
