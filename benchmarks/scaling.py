"""What a step of an optimizer costs as kernels widen, layers are added and devices share the work, beside a model.

    python -m benchmarks scaling

Widths: one square kernel. Layers: those of a GPT, four kernels and two scales each, every one a leaf. Devices: the
same layers, the matrices shared out over a mesh (``mesh_axis=``) or not; on a CPU the devices are threads that share
its cores, so what counts there is one device's part of the work, not the time. A step is ``tx.update`` and
``optax.apply_updates``, float32, state and parameters donated. An ordinary step and one that refreshes are timed
apart; the amortised step is the ordinary one and a tenth of the difference. `benchmarks.scaling_model` has the model of
the dashed lines.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import harness, scaling_devices
from benchmarks.results import Column, result, spread, table
from benchmarks.scaling_model import Product, Rates, curve, exponent, rate_runs, rates, timed
from benchmarks.scaling_parts import METHODS, Contender, apart, calls_of, gpt_layers, one_kernel, over_period
from benchmarks.trees import random_like

WHAT = "Cost of an optimizer's step against the width of a kernel and the number of layers and devices, and a model."
COMPILES = 3  # of a program that is quick to compile; the median counts
APART = "fo_muon_apart"
TIMES = {
    "step_ms": Column("ordinary step, ms", spread=True),
    "refresh_ms": Column("step that refreshes, ms", spread=True),
    "amortised_ms": Column("amortised, ms", spread=True),
    "model_ms": Column("model, ms"),
    "over_model": Column("amortised / model", ".2f"),
    "step_over_model": Column("ordinary step / its model", ".2f"),
    "refresh_over_model": Column("step that refreshes / its model", ".2f"),
    "gflop": Column("products, GF"),
    "over_adamw": Column("times AdamW", ".1f"),
    "compile_s": Column("compile, s", ".2g", spread=True),
    "trace_s": Column("trace, s", ".2g"),
    "stablehlo_lines": Column("StableHLO lines", "d"),
    "hlo_lines": Column("HLO lines", "d"),
}
RATES = {
    "product_gflops": Column("products, GF/s"),
    "qr_ms": Column("QR alone, ms"),
    "eigh_ms": Column("eigh alone, ms"),
    "gbytes": Column("memory, GB/s"),
}
EXPONENTS = {
    "width_step": ("width", "step_ms", Column("ordinary step, width", ".2f")),
    "width_amortised": ("width", "amortised_ms", Column("amortised, width", ".2f")),
    "width_model": ("width", "model_ms", Column("model, width", ".2f")),
    "layers_amortised": ("layers", "amortised_ms", Column("amortised, layers", ".2f")),
    "layers_compile": ("layers", "compile_s", Column("compile, layers", ".2f")),
}
TITLES = {
    "width": "One square kernel: method_width",
    "layers": f"Layers of a GPT: method_layers; {APART}: every leaf a stack of its own",
    "devices": "Layers of a GPT on devices: method_devices; method_every_devices: each device computes all",
    "exponents": "Power of the size by which the cost grows, over the last three sizes",
    "rates": "Rates of the model, by size",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    sizes = {"type": int, "nargs": "*"}
    parser.add_argument("--widths", **sizes, default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--layers", **sizes, default=[1, 2, 4, 8, 16, 32, 64, 96])
    parser.add_argument("--layer-width", type=int, default=128)
    parser.add_argument("--devices", **sizes, default=[1, 2, 4, 8])
    parser.add_argument("--device-layers", type=int, default=12)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=15.0, help="seconds after which no step is repeated")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    environment, left_out = harness.environment(), dict[str, str]()
    found: dict[str, dict[str, Any]] = {"width": {}, "layers": {}, "devices": {}, "rates": {}}

    def so_far() -> dict[str, Any]:
        columns = {"width": TIMES, "layers": TIMES, "devices": scaling_devices.COLUMNS, "rates": RATES}
        tables = {key: table(TITLES[key], columns[key], rows) for key, rows in found.items()}
        titles = {key: column for key, (*_, column) in EXPONENTS.items()}
        tables["exponents"] = table(TITLES["exponents"], titles, exponents(found, options.methods))
        settings = {key: value for key, value in vars(options).items() if key != "out"} | {"left_out": left_out}
        name, command = f"scaling_{environment['platform']}", "python -m benchmarks scaling"
        return result(name, WHAT, command, tables, environment=environment, settings=settings)

    for width in options.widths:
        contenders = {name: Contender(METHODS[name], one_kernel(width)) for name in options.methods}
        add(found, "width", width, contenders, (width, width), options)
        yield so_far()
    for layers in options.layers:
        contenders = on_layers(layers, options, left_out)
        add(found, "layers", layers, contenders, (options.layer_width, 4 * options.layer_width), options)
        yield so_far()
    if options.devices:
        found["devices"] = on_devices(options, environment["platform"], left_out)
        yield so_far()


def on_layers(layers: int, options: argparse.Namespace, left_out: dict[str, str]) -> dict[str, Contender]:
    """The methods on so many layers, but for those that took too long to compile on fewer."""
    methods = {name: METHODS[name] for name in options.methods}
    if "fo_muon" in methods:
        methods[APART] = METHODS["fo_muon"]._replace(build=lambda: apart(METHODS["fo_muon"].build))
    tree, contenders = gpt_layers(layers, options.layer_width), {}
    for name, method in methods.items():
        if name in left_out:
            continue
        contender = contenders[name] = Contender(method, tree, COMPILES, options.patience / 10)
        seconds = contender.compile_s["median"]
        print(f"{layers} layers: {name} compiled in {seconds:.1f} s", flush=True)
        if seconds > options.patience:
            left_out[name] = f"on more than {layers} layers, which took {seconds:.0f} s to compile"
    return contenders


def add(
    found: dict[str, dict[str, Any]],
    part: str,
    size: int,
    contenders: Mapping[str, Contender],
    sides: tuple[int, int],
    options: argparse.Namespace,
) -> None:
    """Time the contenders and the rates of their model, in turns, and add a row of each."""
    products = {name: contender.method.product(*sides) for name, contender in contenders.items()}
    needed, calls = set(products.values()), calls_of(contenders.values())
    tree = next(iter(contenders.values())).params
    inputs = [jax.block_until_ready(random_like(tree, seed)) for seed in range(2)]
    runs = rate_runs(needed, calls)
    runs |= {f"{name} {kind}": run for name, c in contenders.items() for kind, run in c.runs().items()}
    times = timed(runs, inputs, options.repeats, options.patience, f"{part} {size}")
    model = rates(needed, calls, {name: statistics.median(seconds) for name, seconds in times.items()})
    adamw = None
    for name, contender in contenders.items():
        of_mine = {kind: times[f"{name} {kind}"] for kind in contender.runs()}
        cells = row(contender, products[name], of_mine, model)
        amortised = cells["amortised_ms"]["median"]
        adamw = amortised if name == "adamw" else adamw
        found[part][f"{name}_{size}"] = {**cells, "over_adamw": amortised / adamw if adamw else None}
    add_rates(found["rates"], model)


def row(contender: Contender, product: Product, seconds: Mapping[str, Sequence[float]], model: Rates) -> dict[str, Any]:
    """What is known of a contender: seconds by kind of step, beside the model's."""
    ms = {kind: spread([1e3 * t for t in times]) for kind, times in seconds.items()}
    paths = {kind: contender.path(kind) for kind in ms}
    predicted = {kind: 1e3 * model.seconds(path, product, contender.moved) for kind, path in paths.items()}
    program, amortised = contender.programs[0], over_period(ms)
    return {
        **{f"{kind}_ms": cell for kind, cell in ms.items()},
        "amortised_ms": amortised,
        "model_ms": over_period(predicted),
        "over_model": amortised["median"] / over_period(predicted),
        **{f"{kind}_over_model": cell["median"] / predicted[kind] for kind, cell in ms.items()},
        "gflop": over_period({kind: path.products / 1e9 for kind, path in paths.items()}),
        "compile_s": contender.compile_s,
        "trace_s": program.trace_s,
        "stablehlo_lines": program.stablehlo_lines,
        "hlo_lines": program.hlo_lines,
    }


def add_rates(rows: dict[str, dict[str, Any]], model: Rates) -> None:
    """Of each product, and of each factorisation by the side of its matrix; the last measurement of each stays."""
    for product, seconds in model.flop.items():
        rows.setdefault(product.name, {})["product_gflops"] = 1e-9 / seconds
    for call, seconds in model.call.items():
        name, _, shape = call.partition(" ")
        rows.setdefault(shape.strip("()").split(", ")[-1], {})[f"{name}_ms"] = 1e3 * seconds
    rows["memory"] = {"gbytes": 1e-9 / model.byte}


def exponents(found: Mapping[str, Mapping[str, Any]], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        name: {key: exponent(*curve(found[part], name, cell)[:2]) for key, (part, cell, _) in EXPONENTS.items()}
        for name in [*methods, *([APART] if "fo_muon" in methods else [])]
    }


def on_devices(options: argparse.Namespace, platform: str, left_out: dict[str, str]) -> dict[str, Any]:
    """On a CPU in a process of its own, which takes it for as many devices; elsewhere those that there are."""
    sizes, counts = (options.device_layers, options.layer_width, options.repeats), options.devices
    if platform != "cpu":
        there = [k for k in counts if k <= jax.device_count()]
        if len(there) < len(counts):
            left_out["devices"] = f"more than the {jax.device_count()} that there are"
        return scaling_devices.rows(*sizes, there)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(counts)}"
    command = [sys.executable, "-m", "benchmarks.scaling_devices", *map(str, (*sizes, *counts))]
    # A factorisation with threads of its own in each of the devices would only be in the others' way.
    lines, environment = list[str](), {**os.environ, "XLA_FLAGS": flags.strip(), "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            lines.append(line)
            print(line if not line.startswith("{") else "", end="", flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return json.loads(lines[-1])


def draw(found: dict[str, Any]) -> Figure:
    """Times against width and layers, compile times against layers, and one device's part."""
    figure = Figure(figsize=(12, 8.8), layout="constrained")
    (width, layers), (compiling, devices) = figure.subplots(2, 2)
    rows, settings = {key: part["rows"] for key, part in found["tables"].items()}, found["settings"]
    draw_methods(width, rows["width"], "amortised_ms", "model_ms")
    draw_methods(layers, rows["layers"], "amortised_ms", "model_ms")
    draw_methods(compiling, rows["layers"], "compile_s")
    draw_devices(devices, rows["devices"])
    x, y = f"layers of a GPT, width {settings['layer_width']}", "amortised step (ms); dashed: model"
    width.set(title="One square kernel", xlabel="width", ylabel=y)
    layers.set(title="Unrolled layers", xlabel=x, ylabel=y)
    compiling.set(title="Unrolled layers: compiling", xlabel=x, ylabel="compile time (s)")
    title = f"{settings['device_layers']} layers, matrices shared out (mesh_axis=)"
    devices.set(title=title, xlabel="devices", ylabel="one device's part (%)")
    for axes in (width, layers, compiling, devices):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        sizes = sorted({size for line in axes.get_lines() for size in line.get_xdata()})
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
    if devices.get_lines():
        shares = [100 / size for size in devices.get_xticks()]
        devices.set_yticks(shares, [f"{share:.3g}" for share in shares])
        devices.legend(frameon=False)
    methods = {
        label: line for axes in (width, layers) for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(methods.values(), methods.keys(), loc="outside upper center", ncols=len(COLORS), frameon=False)
    return figure


COLORS = {name: f"C{i}" for i, name in enumerate((*METHODS, APART))}


def draw_methods(axes: Axes, rows: Mapping[str, Any], column: str, model: str | None = None) -> None:
    for name, color in COLORS.items():
        sizes, median, low, high = curve(rows, name, column)
        if not sizes:
            continue
        ends = [[abs(a - b) for a, b in zip(median, end, strict=True)] for end in (low, high)]
        axes.errorbar(sizes, median, ends, fmt="o-", markersize=4, linewidth=1.2, color=color, label=name)
        if model is not None:
            sizes, predicted, *_ = curve(rows, name, model)
            axes.plot(sizes, predicted, "--", linewidth=1, alpha=0.7, color=color)


def draw_devices(axes: Axes, rows: Mapping[str, Any]) -> None:
    """Products, and SOAP's state, go down by the same matrices: one line is enough."""
    for name, column, style, what in (
        ("fo_soap", "gflop_share", "o-", "products and state; fo_muon: products"),
        ("fo_soap", "memory_share", "s-.", "temporaries and results"),
        ("fo_muon", "memory_share", "s-.", "temporaries and results"),
    ):
        sizes, share, *_ = curve(rows, name, column)
        if sizes:
            shares = [100 * part for part in share]
            axes.plot(sizes, shares, style, color=COLORS[name], alpha=0.8, label=f"{name}: {what}")
            if column == "gflop_share":
                axes.plot(sizes, [100 / size for size in sizes], "--", color="grey", label="100 % / devices")
