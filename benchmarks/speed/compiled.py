"""What the compilers for TPU and GPU make of each optimizer's step on GPT-2's tree: compile time and memory.

The compilers come with JAX's plugins and need no device; nothing is run. Each machine wants an environment of its own:

    python -m venv v && v/bin/pip install -e '.[dev]' 'jax[tpu]==0.10.2'        # v5e, v5p, v6e
    python -m venv w && w/bin/pip install -e '.[dev]' 'jax[cuda12]==0.10.2'     # h200; 5.6 GB on disk
    JAX_PLATFORMS=cpu v/bin/python -m benchmarks compiled --machine v5e
    JAX_PLATFORMS=cpu w/bin/python -m benchmarks compiled --machine h200

A step is an optimizer's update and its addition to the parameters, which give their memory to the results, as the state
does. Optimizers are compiled in turns, and ratios are of the same turn. Statistics are arguments of K-FAC's step.
"Decompositions" are the calls of a factorisation in the program, loops counted once. In "scanned" the layers' kernels
are stacked along a leading axis; in "distinct" each of twelve small layers has a shape of its own. ``--machine cpu`` is
the compiler for the CPU at hand.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

import fisher_optax as fo
from benchmarks import harness, pictures, results
from benchmarks.catalogue import listed, positive
from benchmarks.results import Column
from benchmarks.steps import update_of
from benchmarks.trees import TREES, hidden, make_params
from fisher_optax.statistics import LayerFactors

TOPOLOGIES = {
    "v5e": ("tpu", "v5e:2x2"),
    "v5p": ("tpu", "v5p:2x2x1"),
    "v6e": ("tpu", "v6e:2x2"),
    "h200": ("gpu", "1x1x1"),
}
# What NVIDIA's compiler has to know of an H200.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0" device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  model_str: "sm_9.0 with 151397597184B RAM, 132 cores, 1980000KHz clock, 3750000KHz mem clock, 52428800B L2$"
  name: "NVIDIA H200 141GB HBM3e"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""
DISTINCT = "distinct"
# There, over optax.contrib.muon's compile time, by the compiler for a CPU.
OF_DISTINCT = {"muon": 1.0, "soap": 1.5, "dykaf": 2.0}
DECOMPOSITIONS = re.compile(r"syevd|syevj|geqrf|potrf|getrf|gesvd|QrDecomp|Qr|Eigh|Cholesky|Lu")


class Contender(NamedTuple):
    """An optimizer, and its bounds over optax.contrib.muon's compile time, on a TPU and a GPU."""

    label: str
    make: Callable[[Any], optax.GradientTransformation]
    compile_at_most: tuple[float, float] | None = None
    temporaries_at_most: float | None = None  # over the state, or, of Muon, the parameters
    captured: bool = False


def _optax_muon(axes: Any) -> Any:
    def numbers(a: Any) -> Any:
        return None if a is None else optax.contrib.MuonDimensionNumbers(a.inputs, a.outputs)

    is_axes = lambda a: a is None or isinstance(a, fo.MatrixAxes)  # noqa: E731
    return optax.contrib.muon(1e-3, muon_weight_dimension_numbers=jax.tree.map(numbers, axes, is_leaf=is_axes))


def ours(make: Callable[..., Any], *bounds: Any, captured: bool = False) -> Contender:
    return Contender(f"fo.{make.__name__}", lambda axes: make(1e-3, axes=axes), *bounds, captured=captured)


REST = (2.5, 1.75)
CONTENDERS = {
    "adamw": Contender("optax.adamw", lambda axes: optax.adamw(1e-3)),
    "optax_muon": Contender("optax.contrib.muon", _optax_muon),
    "muon": ours(fo.muon, (0.6, 0.6), 0.5),
    "soap": ours(fo.soap, (2.0, 1.25), 0.35),
    "kl_soap": ours(fo.kl_soap, REST),
    "dykaf": ours(fo.dykaf, REST),
    "shampoo": ours(fo.shampoo, REST),
    "kfac": ours(fo.kfac, REST, 0.35, captured=True),
    "ekfac": ours(fo.ekfac, REST, captured=True),
    "kfac_soap": ours(fo.kfac_soap, REST, captured=True),
}


def device_of(machine: str) -> Any:
    """A device that can be compiled for."""
    if machine == "cpu":
        return jax.devices("cpu")[0]
    from jax.experimental import topologies

    platform, topology = TOPOLOGIES[machine]
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_autotune_level=0")  # there is nothing to tune on
    return topologies.get_topology_desc("", "cuda", target_config=H200, topology=topology).devices[0]


def params_and_axes(params: Any, scanned: bool) -> tuple[Any, Any]:
    """Parameters without values, and which axes of the kernels are inputs and outputs."""
    if scanned:
        params = dict(params)
        blocks = {name: params.pop(name) for name in list(params) if name.startswith("block_")}
        block = next(iter(blocks.values()))
        stacked = lambda x: jax.ShapeDtypeStruct((len(blocks), *x.shape), x.dtype)  # noqa: E731
        params["blocks"] = jax.tree.map(stacked, block)
    first = 1 if scanned else 0
    of_kernel = fo.MatrixAxes((first,), (first + 1,), tuple(range(first)))
    return params, jax.tree.map(lambda x: of_kernel if x else None, hidden(params))


def layers_of_distinct_shapes(count: int = 12) -> dict[str, Any]:
    """Dense layers, each a little larger than the one before."""

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    sizes = [(8 + i, 16 + 2 * i) for i in range(count)]
    return {f"layer_{i}": {"kernel": leaf(m, n), "bias": leaf(n)} for i, (m, n) in enumerate(sizes)}


def statistics_of(params: Any, axes: Any, squares: bool) -> Any:
    """Factors of each kernel, as capture gives them."""

    def one(x: Any, a: Any) -> Any:
        if a is None:
            return None
        batch = x.shape[: len(a.batch)]
        side = lambda d: jax.ShapeDtypeStruct((*batch, d, d), jnp.float32)  # noqa: E731
        weight = jax.ShapeDtypeStruct((), jnp.float32)
        return LayerFactors(side(x.shape[-2]), side(x.shape[-1]), x if squares else None, weight, axes=a)

    return jax.tree.map(one, params, axes, is_leaf=lambda x: x is None)


def compiled(contender: Contender, device: Any, params: Any, scanned: bool = False) -> dict[str, float]:
    """What one compilation takes and gives."""
    params, axes = params_and_axes(params, scanned)
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = lambda t: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), t)  # noqa: E731
    tx, statistics = contender.make(axes), None
    if contender.captured:
        statistics = statistics_of(params, axes, squares=contender.label == "fo.ekfac")
    state = jax.eval_shape(tx.init, params)

    def step(grads: Any, state: Any, params: Any, statistics: Any) -> Any:
        given = {"statistics": statistics} if contender.captured else {}
        return update_of(tx, **given)(grads, state, params)

    given = map(placed, (params, state, params, statistics))
    with jax.set_mesh(mesh), harness.compiling_anew():
        program = harness.compile_program(step, *given, donate=(1, 2))
    return measures(program.run, {"trace_s": program.trace_s, "compile_s": program.compile_s}, params, state)


def measures(program: Any, times: Mapping[str, float], params: Any, state: Any) -> dict[str, float]:
    """Of a compiled program, read from its text and its memory plan."""
    memory, text = program.memory_analysis(), program.as_text() or ""
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    temporaries = memory.temp_size_in_bytes
    return {
        **times,
        "temporaries_mb": temporaries / 1e6,
        "over_state": temporaries / max(harness.nbytes(state), 1),
        "over_parameters": temporaries / harness.nbytes(params),
        "code_mb": memory.generated_code_size_in_bytes / 1e6,
        "decompositions": sum(bool(DECOMPOSITIONS.search(call)) for call in calls),
        "conditionals": text.count(" conditional("),
        "loops": text.count(" while("),
        "copies": text.count(" copy("),
    }


COLUMNS = {
    "label": Column("optimizer"),
    "compile": Column("compile, s", ".1f", spread=True),
    "ratio": Column("over optax.contrib.muon's", ".2f", spread=True),
    "ratio_at_most": Column("at most", ".3g"),
    "temporaries_mb": Column("temporaries, MB", ".0f"),
    "over_state": Column("over the state", ".2f"),
    "over_parameters": Column("over the parameters", ".2f"),
    "temporaries_at_most": Column("at most", ".3g"),
    **{name: Column(name.removesuffix("_mb"), ".0f") for name in ("code_mb", "decompositions", "conditionals")},
    **{name: Column(name, ".0f") for name in ("loops", "copies")},
    "holds": Column("holds"),
}


def rows_of(found: Mapping[str, list[dict[str, float]]], tree: str, machine: str) -> dict[str, dict[str, Any]]:
    """A row of the table for each optimizer; a ratio is of one turn."""
    rows: dict[str, dict[str, Any]] = {}
    totals = {name: [x["trace_s"] + x["compile_s"] for x in turns] for name, turns in found.items()}
    for name, turns in found.items():
        contender, last, judged = CONTENDERS[name], turns[-1], []
        row: dict[str, Any] = {"label": contender.label, "compile": results.spread(totals[name])}
        row |= {key: last[key] for key in COLUMNS if key in last}
        if ratios := [a / b for a, b in zip(totals[name], totals.get("optax_muon", []), strict=False)]:
            row["ratio"] = results.spread(ratios)
            if at_most := compile_bound(name, tree, machine):
                row["ratio_at_most"] = at_most
                judged.append(row["ratio"]["median"] <= at_most)
        if contender.temporaries_at_most and machine != "cpu" and tree != DISTINCT:
            row["temporaries_at_most"] = contender.temporaries_at_most
            judged.append(last["over_parameters" if name == "muon" else "over_state"] <= contender.temporaries_at_most)
        rows[name] = row | ({"holds": all(judged)} if judged else {})
    return rows


def compile_bound(name: str, tree: str, machine: str) -> float | None:
    """Over optax.contrib.muon's time, where there is one."""
    if tree == DISTINCT or machine == "cpu":
        return OF_DISTINCT.get(name) if (tree, machine) == (DISTINCT, "cpu") else None
    bounds = CONTENDERS[name].compile_at_most
    return bounds and bounds[machine == "h200"]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", choices=[*TOPOLOGIES, "cpu"], default="cpu", help="to compile for")
    parser.add_argument("--tree", choices=[*TREES, DISTINCT], default="gpt2")
    parser.add_argument("--scanned", action="store_true", help="kernels of all layers in one array")
    parser.add_argument("--rounds", type=positive, default=3, help="how often each is compiled")
    parser.add_argument("--only", type=listed(CONTENDERS), default=list(CONTENDERS), help=", ".join(CONTENDERS))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.scanned and options.tree == DISTINCT:
        raise SystemExit(f"--scanned stacks layers of one shape; --tree {DISTINCT} has none.")
    device, found = device_of(options.machine), {name: [] for name in options.only}
    tree = options.tree + ("_scanned" if options.scanned else "")
    params = layers_of_distinct_shapes() if options.tree == DISTINCT else make_params(TREES[options.tree])
    turns = tqdm([(i, name) for i in range(options.rounds) for name in options.only])
    for _, name in turns:
        turns.set_description(name)
        found[name].append(compiled(CONTENDERS[name], device, params, options.scanned))
    yield results.result(
        f"compiled_{tree}_{options.machine}",
        f"What the compiler for {options.machine} makes of a step of each optimizer.",
        options.command,
        {"steps": results.table("One step, compiled", COLUMNS, rows_of(found, options.tree, options.machine))},
        settings={"tree": tree, "machine": options.machine, "rounds": options.rounds},
    )


def draw(found: dict[str, Any]) -> Figure:
    """Compile times over optax.contrib.muon's, and temporaries over the state, with their bounds."""
    rows, settings = found["tables"]["steps"]["rows"], found["settings"]
    bounded = {name: {**row, "temporaries_at_most": None} if name == "muon" else row for name, row in rows.items()}
    return pictures.bars(
        f"Compiled for {settings['machine']}, tree {settings['tree']}",
        pictures.Bars(rows, "ratio", "compile time over optax.contrib.muon's", {"ratio_at_most": "the bound"}),
        pictures.Bars(bounded, "over_state", "temporaries over the state", {"temporaries_at_most": "the bound"}),
    )
