"""What a step of an optimizer costs as kernels widen, layers are added and devices share the work.

    python -m benchmarks scaling

Widths: one square kernel. Layers: those of a GPT, four kernels and two scales each, every one a leaf. Devices: the
same layers, the matrices shared out over a mesh (``mesh_axis=``) or not; on a CPU the devices are threads that share
its cores, so what counts there is one device's part of the work, not the time. A step is ``tx.update`` and
``optax.apply_updates``, float32, state and parameters donated. An ordinary step and one that refreshes are timed
apart; the amortised step is the ordinary one and a tenth of the difference.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import harness, pictures
from benchmarks.catalogue import listed, positive
from benchmarks.results import Column, ends, middle, result, spread, table
from benchmarks.speed import devices
from benchmarks.speed.sized import METHODS, Contender, apart, period, timed
from benchmarks.trees import Tree, layers_of, random_like

WHAT = "Cost of an optimizer's step against the width of a kernel and the number of layers and devices."
COMPILES = 3  # of a program that is quick to compile; the median counts
APART = "fo_muon_apart"
COLORS = {name: f"C{i}" for i, name in enumerate((*METHODS, APART))}
TIMES = {
    "step_ms": Column("ordinary step, ms", spread=True),
    "refresh_ms": Column("step that refreshes, ms", spread=True),
    "amortised_ms": Column("amortised, ms", spread=True),
    "gflop": Column("products, GF"),
    "over_adamw": Column("times AdamW", ".1f"),
    "compile_s": Column("compile, s", ".2g", spread=True),
    "trace_s": Column("trace, s", ".2g"),
    "stablehlo_lines": Column("StableHLO lines", "d"),
    "hlo_lines": Column("HLO lines", "d"),
}
TABLES = {
    "width": ("One square kernel: method_width", TIMES),
    "layers": (f"Layers of a GPT: method_layers; {APART}: every leaf a stack of its own", TIMES),
    "devices": (
        "Layers of a GPT on devices: method_devices; method_every_devices: each device computes all",
        devices.COLUMNS,
    ),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = listed(of=int)
    parser.add_argument("--widths", type=sizes, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--layers", type=sizes, default=[1, 2, 4, 8, 16, 32, 64, 96])
    parser.add_argument("--layer-width", type=positive, default=128)
    parser.add_argument("--devices", type=sizes, default=[1, 2, 4, 8])
    parser.add_argument("--device-layers", type=positive, default=12)
    parser.add_argument("--methods", type=listed(METHODS), default=list(METHODS))
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--patience", type=float, default=15.0, help="seconds after which no step is repeated")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    platform, left_out = harness.environment()["platform"], dict[str, str]()
    found: dict[str, dict[str, Any]] = {key: {} for key in TABLES}

    def so_far() -> dict[str, Any]:
        tables = {key: table(*TABLES[key], rows) for key, rows in found.items()}
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "command")}
        return result(f"scaling_{platform}", WHAT, options.command, tables, settings={**settings, "left_out": left_out})

    for width in options.widths:
        kernel = {"layer": {"kernel": jax.ShapeDtypeStruct((width, width), jnp.float32)}}
        contenders = {name: Contender(METHODS[name], kernel) for name in options.methods}
        found["width"] |= rows_of("width", width, contenders, kernel, options)
        yield so_far()
    for layers in options.layers:
        tree = layers_of(Tree(layers, options.layer_width))
        found["layers"] |= rows_of("layers", layers, on_layers(tree, layers, options, left_out), tree, options)
        yield so_far()
    if options.devices:
        found["devices"] = on_devices(options, platform, left_out)
        yield so_far()


def on_layers(tree: Any, layers: int, options: argparse.Namespace, left_out: dict[str, str]) -> dict[str, Contender]:
    """The methods on so many layers, but for those that took too long to compile on fewer."""
    methods = {name: METHODS[name] for name in options.methods}
    if "fo_muon" in methods:
        methods[APART] = METHODS["fo_muon"]._replace(build=lambda: apart(METHODS["fo_muon"].build))
    contenders = {}
    for name in (name for name in methods if name not in left_out):
        contenders[name] = Contender(methods[name], tree, COMPILES, options.patience / 10)
        seconds = contenders[name].steps.programs[0].compile_s
        print(f"{layers} layers: {name} compiled in {seconds:.1f} s", flush=True)
        if seconds > options.patience:
            left_out[name] = f"on more than {layers} layers, which took {seconds:.0f} s to compile"
    return contenders


def rows_of(
    part: str, size: int, contenders: Mapping[str, Contender], tree: Any, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """A row of each contender; all take turns."""
    inputs = [jax.block_until_ready(random_like(tree, seed)) for seed in range(2)]
    runs = {f"{name} {kind}": run for name, c in contenders.items() for kind, run in c.runs().items()}
    times = timed(runs, inputs, options.repeats, options.patience, f"{part} {size}")
    rows = {}
    for name, contender in contenders.items():
        ms = {kind: spread([1e3 * t for t in times[f"{name} {kind}"]]) for kind in contender.runs()}
        cells = {f"{kind}_ms": cell for kind, cell in ms.items()} | {"amortised_ms": period(ms)}
        rows[name] = {**cells, "gflop": contender.gflop, **contender.steps.compiling()}
    if "adamw" in rows:
        for row in rows.values():
            row["over_adamw"] = row["amortised_ms"]["median"] / rows["adamw"]["amortised_ms"]["median"]
    return {f"{name}_{size}": row for name, row in rows.items()}


def curve(rows: Mapping[str, Any], method: str, column: str) -> tuple[list[float], list[Any]]:
    """Sizes and cells of the rows ``method_SIZE`` that have this cell."""
    named = [(*name.rpartition("_")[::2], row.get(column)) for name, row in rows.items()]
    points = sorted(
        (float(size), i) for i, (name, size, cell) in enumerate(named) if name == method and cell is not None
    )
    return [size for size, _ in points], [named[i][2] for _, i in points]


def on_devices(options: argparse.Namespace, platform: str, left_out: dict[str, str]) -> dict[str, Any]:
    """On a CPU in a process of its own, which takes it for as many devices; elsewhere those that there are."""
    sizes, counts = (options.device_layers, options.layer_width, options.repeats), options.devices
    if platform != "cpu":
        there = [k for k in counts if k <= jax.device_count()]
        if len(there) < len(counts):
            left_out["devices"] = f"more than the {jax.device_count()} that there are"
        return devices.rows(*sizes, there)
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
    panels = figure.subplots(2, 2).ravel()
    rows, settings = {key: part["rows"] for key, part in found["tables"].items()}, found["settings"]
    time, layers = "amortised step (ms)", f"layers of a GPT, width {settings['layer_width']}"
    draw_methods(panels[0], rows["width"], "amortised_ms")
    draw_methods(panels[1], rows["layers"], "amortised_ms")
    draw_methods(panels[2], rows["layers"], "compile_s")
    for name, column in (("fo_soap", "gflop_share"), ("fo_soap", "memory_share"), ("fo_muon", "memory_share")):
        sizes, shares = curve(rows["devices"], name, column)
        what = "products and state" if column == "gflop_share" else "temporaries and results"
        style = "o-" if column == "gflop_share" else "s-."
        panels[3].plot(sizes, [100 * x for x in shares], style, color=COLORS[name], label=f"{name}: {what}")
    panels[3].legend(frameon=False)
    panels[0].set(title="One square kernel", xlabel="width", ylabel=time)
    panels[1].set(title="Unrolled layers", xlabel=layers, ylabel=time)
    panels[2].set(title="Unrolled layers: compiling", xlabel=layers, ylabel="compile time (s)")
    title = f"{settings['device_layers']} layers, matrices shared out (mesh_axis=)"
    panels[3].set(title=title, xlabel="devices", ylabel="one device's part (%)")
    for axes in panels:
        axes.set(xscale="log", yscale="log")
        pictures.plain_ticks(axes, sorted({size for line in axes.get_lines() for size in line.get_xdata()}))
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(COLORS), frameon=False)
    return figure


def draw_methods(axes: Axes, rows: Mapping[str, Any], column: str) -> None:
    for name, color in COLORS.items():
        sizes, cells = curve(rows, name, column)
        if sizes:
            around = np.abs(np.array([ends(cell) for cell in cells]).T - [middle(cell) for cell in cells])
            axes.errorbar(sizes, [middle(c) for c in cells], around, fmt="o-", markersize=4, color=color, label=name)
