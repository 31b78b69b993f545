"""What the compilers for TPU and GPU make of each optimizer's step on GPT-2's tree: compile time and memory.

The compilers come with JAX's plugins and need no device; nothing is run. Each machine wants an environment of its own:

    python -m venv v && v/bin/pip install -e '.[dev]' 'jax[tpu]==0.10.2'        # v5e, v5p, v6e
    python -m venv w && w/bin/pip install -e '.[dev]' 'jax[cuda12]==0.10.2'     # h200; 5.6 GB on disk
    JAX_PLATFORMS=cpu v/bin/python -m benchmarks compiled --machine v5e
    JAX_PLATFORMS=cpu w/bin/python -m benchmarks compiled --machine h200

A step is an optimizer's update and its addition to the parameters, which give their memory to the results, as the state
does. Optimizers are compiled in turns, and ratios are of the same turn. Statistics are arguments of K-FAC's step.
"Decompositions" are the calls of a factorisation in the program, loops counted once. In the tree "gpt2_scanned" the
layers' kernels are stacked along a leading axis; in "distinct" each of twelve small layers has a shape of its own.
``--machine cpu`` is the compiler for the CPU at hand.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
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
from benchmarks.results import columns
from benchmarks.steps import update_of
from benchmarks.trees import TREES, hidden, make_params
from fisher_optax.statistics import LayerFactors

TOPOLOGIES = {
    "v5e": ("tpu", "v5e:2x2"), "v5p": ("tpu", "v5p:2x2x1"), "v6e": ("tpu", "v6e:2x2"), "h200": ("gpu", "1x1x1"),
}  # fmt: skip
H200 = Path(__file__).with_name("h200.textproto")  # what NVIDIA's compiler has to know of one
DISTINCT = "distinct"
SCANNED = "gpt2_scanned"
DECOMPOSITIONS = re.compile(r"syevd|syevj|geqrf|potrf|getrf|gesvd|QrDecomp|Qr|Eigh|Cholesky|Lu")
COUNTED = {"conditionals": " conditional(", "loops": " while(", "copies": " copy("}  # in the program's text
COLUMNS = columns(
    "label: optimizer; compile: compile, s | .1f ±; ratio: over optax.contrib.muon's | .2f ±; ratio_at_most: at most;"
    "temporaries_mb: temporaries, MB | .0f; over_state: over the state | .2f;"
    "over_parameters: over the parameters | .2f; temporaries_at_most: at most; code_mb: code | .0f;"
    "decompositions: decompositions | .0f; conditionals: conditionals | .0f; loops: loops | .0f; copies: copies | .0f;"
    "holds: holds"
)


class Contender(NamedTuple):
    """An optimizer, and its bounds over optax.contrib.muon's compile time."""

    label: str
    make: Callable[[Any], optax.GradientTransformation]
    of_tpu: float | None = None
    of_gpu: float | None = None
    of_distinct: float | None = None  # by the compiler for a CPU
    temporaries: float | None = None  # the bound over the state, or, of Muon, the parameters
    captured: bool = False

    def compile_at_most(self, tree: str, machine: str) -> float | None:
        if tree == DISTINCT or machine == "cpu":
            return self.of_distinct if (tree, machine) == (DISTINCT, "cpu") else None
        return self.of_gpu if machine == "h200" else self.of_tpu


def _optax_muon(axes: Any) -> Any:
    def numbers(a: Any) -> Any:
        return None if a is None else optax.contrib.MuonDimensionNumbers(a.inputs, a.outputs)

    is_axes = lambda a: a is None or isinstance(a, fo.MatrixAxes)  # noqa: E731
    return optax.contrib.muon(1e-3, muon_weight_dimension_numbers=jax.tree.map(numbers, axes, is_leaf=is_axes))


def _ours(make: Callable[..., Any], *bounds: float | None, captured: bool = False) -> Contender:
    bounds = (*bounds, *[None] * (4 - len(bounds)))
    return Contender(f"fo.{make.__name__}", lambda axes: make(1e-3, axes=axes), *bounds, captured=captured)


CONTENDERS = {
    "adamw": Contender("optax.adamw", lambda axes: optax.adamw(1e-3)),
    "optax_muon": Contender("optax.contrib.muon", _optax_muon),
    "muon": _ours(fo.muon, 0.6, 0.6, 1.0, 0.5),
    "soap": _ours(fo.soap, 2.0, 1.25, 1.5, 0.35),
    "kl_soap": _ours(fo.kl_soap, 2.5, 1.75),
    "dykaf": _ours(fo.dykaf, 2.5, 1.75, 2.0),
    "shampoo": _ours(fo.shampoo, 2.5, 1.75),
    "kfac": _ours(fo.kfac, 2.5, 1.75, None, 0.35, captured=True),
    "ekfac": _ours(fo.ekfac, 2.5, 1.75, captured=True),
    "kfac_soap": _ours(fo.kfac_soap, 2.5, 1.75, captured=True),
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
    return topologies.get_topology_desc("", "cuda", target_config=H200.read_text(), topology=topology).devices[0]


def layers_of_distinct_shapes(count: int = 12) -> dict[str, Any]:
    """Dense layers, each a little larger than the one before."""
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    sizes = [(8 + i, 16 + 2 * i) for i in range(count)]
    return {f"layer_{i}": {"kernel": leaf(m, n), "bias": leaf(n)} for i, (m, n) in enumerate(sizes)}


def params_and_axes(tree: str) -> tuple[Any, Any]:
    """Parameters without values, and which axes of the kernels are inputs and outputs."""
    plain = tree.removesuffix("_scanned")
    params = layers_of_distinct_shapes() if plain == DISTINCT else dict(make_params(TREES[plain]))
    if plain != tree:
        blocks = [params.pop(name) for name in list(params) if name.startswith("block_")]
        stacked = lambda x: jax.ShapeDtypeStruct((len(blocks), *x.shape), x.dtype)  # noqa: E731
        params["blocks"] = jax.tree.map(stacked, blocks[0])
    of_kernel = fo.MatrixAxes(0, 1) if plain == tree else fo.MatrixAxes(1, 2, 0)
    return params, jax.tree.map(lambda x: of_kernel if x else None, hidden(params))


def statistics_of(params: Any, axes: Any, squares: bool) -> Any:
    """Factors of each kernel, as capture gives them."""

    def of_leaf(x: Any, a: Any) -> Any:
        if a is None:
            return None
        side = lambda d: jax.ShapeDtypeStruct((*x.shape[:-2], d, d), jnp.float32)  # noqa: E731
        weight = jax.ShapeDtypeStruct((), jnp.float32)
        return LayerFactors(side(x.shape[-2]), side(x.shape[-1]), x if squares else None, weight, axes=a)

    return jax.tree.map(of_leaf, params, axes, is_leaf=lambda x: x is None)


def compiled(contender: Contender, device: Any, params: Any, axes: Any) -> dict[str, float]:
    """What one compilation takes and gives."""
    mesh = Mesh(np.array([device]), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = lambda t: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), t)  # noqa: E731
    tx, state = contender.make(axes), jax.eval_shape(contender.make(axes).init, params)
    given = {}
    if contender.captured:
        given = {"statistics": statistics_of(params, axes, squares=contender.label == "fo.ekfac")}

    def step(grads: Any, state: Any, params: Any, given: Any) -> Any:
        return update_of(tx, **given)(grads, state, params)

    with jax.set_mesh(mesh), harness.compiling_anew():
        program = harness.compile_program(step, *map(placed, (params, state, params, given)), donate=(1, 2))
    return measures(program.run, params, state) | {"compile": program.trace_s + program.compile_s}


def measures(program: Any, params: Any, state: Any) -> dict[str, float]:
    """Of a compiled program, read from its text and its memory plan."""
    memory, text = program.memory_analysis(), program.as_text() or ""
    calls = re.findall(r'custom_call_target="([^"]+)"', text)
    temporaries = memory.temp_size_in_bytes
    return {
        "temporaries_mb": temporaries / 1e6,
        "over_state": temporaries / max(harness.nbytes(state), 1),
        "over_parameters": temporaries / harness.nbytes(params),
        "code_mb": memory.generated_code_size_in_bytes / 1e6,
        "decompositions": sum(bool(DECOMPOSITIONS.search(call)) for call in calls),
        **{name: text.count(word) for name, word in COUNTED.items()},
    }


def rows_of(found: Mapping[str, list[dict[str, float]]], tree: str, machine: str) -> dict[str, dict[str, Any]]:
    """A row of the table for each optimizer; a ratio is of one turn."""
    rows: dict[str, dict[str, Any]] = {}
    seconds = {name: [turn["compile"] for turn in turns] for name, turns in found.items()}
    for name, turns in found.items():
        contender, judged = CONTENDERS[name], []
        row: dict[str, Any] = {"label": contender.label, **turns[-1], "compile": results.spread(seconds[name])}
        if ratios := [a / b for a, b in zip(seconds[name], seconds.get("optax_muon", []), strict=False)]:
            row["ratio"] = results.spread(ratios)
            if at_most := contender.compile_at_most(tree, machine):
                row["ratio_at_most"] = at_most
                judged.append(row["ratio"]["median"] <= at_most)
        if contender.temporaries and machine != "cpu" and tree != DISTINCT:
            row["temporaries_at_most"] = contender.temporaries
            judged.append(row["over_parameters" if name == "muon" else "over_state"] <= contender.temporaries)
        rows[name] = row | ({"holds": all(judged)} if judged else {})
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--machine", choices=[*TOPOLOGIES, "cpu"], default="cpu", help="to compile for")
    parser.add_argument("--tree", choices=[*TREES, SCANNED, DISTINCT], default="gpt2")
    parser.add_argument("--rounds", type=positive, default=3, help="how often each is compiled")
    parser.add_argument("--only", type=listed(CONTENDERS), default=list(CONTENDERS), help=", ".join(CONTENDERS))


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device, found = device_of(options.machine), {name: [] for name in options.only}
    params, axes = params_and_axes(options.tree)
    turns = tqdm([(i, name) for i in range(options.rounds) for name in options.only])
    for _, name in turns:
        turns.set_description(name)
        found[name].append(compiled(CONTENDERS[name], device, params, axes))
    yield results.result(
        f"compiled_{options.tree}_{options.machine}",
        f"What the compiler for {options.machine} makes of a step of each optimizer.",
        options.command,
        {"steps": results.table("One step, compiled", COLUMNS, rows_of(found, options.tree, options.machine))},
        settings={"tree": options.tree, "machine": options.machine, "rounds": options.rounds},
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
