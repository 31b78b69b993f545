"""Time of the optimizer step alone, on the parameter trees of two character GPTs, against other JAX optimizers.

    python -m benchmarks.step_time --tree all --repeats 3

A step is ``tx.update`` and ``optax.apply_updates`` on float32 parameters, with state and parameters donated and random
gradients drawn beforehand. All contenders take turns in one run. A repeat is ten steps, so that it
contains each refresh once; the medians over the repeats of these ten give the usual step (their median), the slowest
and the mean. The floor is the flops of the method's own matrix products at the machine's best matrix rate in that run.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import fisher_optax as fo
from benchmarks import harness
from benchmarks.flops import FlopCount, count_matmul_flops

PERIOD = 10  # steps between refreshes, of every method that has them
WARM_UP = 2  # steps that are not counted: the first starts the bases
COMPILES = 5  # of each contender, in turns; the median counts
PATIENCE = 20.0  # seconds; what takes longer to compile is compiled once
GRADIENTS = 4  # drawn beforehand, in turns: allocating them between steps would be timed as page faults in the step
RATE = 1e-3
COLUMNS = {
    "name": "optimizer",
    "step_ms": "step ms",
    "slowest_ms": "slowest",
    "mean_ms": "mean",
    "floor_ms": "floor",
    "over_floor": "mean/floor",
    "over_optax_muon": "/optax_muon",
    "over_adamw": "/adamw",
    "compile_s": "compile s",
    "stablehlo_lines": "StableHLO",
    "state_over_params": "state/params",
    "step_gflop": "step GF",
}


class Tree(NamedTuple):
    """A GPT in nanoGPT's layout: learned positions, four bias-free kernels a layer, the head tied to the embedding."""

    layers: int
    width: int
    vocabulary: int = 65
    context: int = 256


TREES = {"small": Tree(6, 384), "deep": Tree(12, 256)}


def make_params(tree: Tree) -> dict[str, Any]:
    """The tree as ``jax.ShapeDtypeStruct``, named as Flax would."""
    d = tree.width

    def leaf(name: str, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32)}

    block = {
        "ln_1": leaf("scale", d),
        "attn": {"qkv": leaf("kernel", d, 3 * d), "proj": leaf("kernel", d, d)},
        "ln_2": leaf("scale", d),
        "mlp": {"up": leaf("kernel", d, 4 * d), "down": leaf("kernel", 4 * d, d)},
    }
    blocks = {f"block_{i}": block for i in range(tree.layers)}
    embeddings = {"wte": leaf("embedding", tree.vocabulary, d), "wpe": leaf("embedding", tree.context, d)}
    return {**embeddings, **blocks, "ln_f": leaf("scale", d)}


def hidden(params: Any) -> Any:
    """True for the kernels, which the matrix methods take; embeddings and scales are left to Adam."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def on_hidden(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``tx`` on the hidden kernels, AdamW on the rest: what the contenders with rules of their own do by themselves."""
    return optax.partition({True: tx, False: optax.adamw(RATE)}, hidden)


def optax_muon() -> optax.GradientTransformation:
    numbers = optax.contrib.MuonDimensionNumbers()

    def dimensions(params: Any) -> Any:
        return jax.tree.map(lambda is_hidden: numbers if is_hidden else None, hidden(params))

    return optax.contrib.muon(RATE, muon_weight_dimension_numbers=dimensions)


def soap_jax() -> optax.GradientTransformation:
    from soap_jax import soap  # pyright: ignore[reportMissingImports]

    return on_hidden(soap(RATE, precondition_frequency=PERIOD))


def psgd_kron() -> optax.GradientTransformation:
    from psgd_jax.kron import kron  # pyright: ignore[reportMissingImports]

    return on_hidden(kron(RATE))


def distributed_shampoo() -> optax.GradientTransformation:
    from distributed_shampoo import distributed_shampoo as shampoo  # pyright: ignore[reportMissingImports]

    return on_hidden(shampoo(RATE, block_size=128, preconditioning_compute_steps=PERIOD))


CONTENDERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(RATE),
    "optax_muon": optax_muon,
    "fo_muon": lambda: fo.muon(RATE),
    "fo_soap": lambda: fo.soap(RATE, precondition_frequency=PERIOD),
    "fo_soap_staggered": lambda: fo.soap(RATE, precondition_frequency=PERIOD, refresh="staggered"),
    "fo_dykaf": lambda: fo.dykaf(RATE, precondition_frequency=PERIOD),
    "fo_shampoo_128": lambda: fo.shampoo(RATE, block_size=128, precondition_frequency=PERIOD),
    "soap_jax": soap_jax,
    "psgd_kron": psgd_kron,
    "distributed_shampoo": distributed_shampoo,
}


class Contender:
    """An optimizer compiled for a tree, with the parameters and the state it has reached."""

    def __init__(self, tx: optax.GradientTransformation, shapes: Any):
        def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
            # Results in the order of the arguments: JAX hands donated buffers to results of their shape in that order,
            # and parameters written where a momentum was would first be copied.
            updates, state = tx.update(grads, state, params)
            return state, optax.apply_updates(params, updates)

        self.params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        self.state = jax.tree.map(jnp.copy, tx.init(self.params))  # no buffer twice, or it could not be donated
        self.flops = count_matmul_flops(step, shapes, self.state, shapes)
        self.step, self.shapes, self.compiles = step, shapes, []
        self.program = self.compile()

    def compile(self) -> harness.Program:
        """The step, compiled anew; what that took is kept."""
        program = harness.compile_program(self.step, self.shapes, self.state, self.params, donate=(1, 2))
        self.compiles.append(program)
        return program

    def __call__(self, grads: Any) -> Any:
        self.state, self.params = self.program.run(grads, self.state, self.params)
        return self.params, self.state

    def size(self) -> dict[str, Any]:
        """What is known of it before it runs."""
        state_bytes = harness.nbytes(self.state)
        between, most = flops_between_refreshes(self.flops), self.flops.most
        return {
            "trace_s": statistics.median(program.trace_s for program in self.compiles),
            "compile_s": statistics.median(program.compile_s for program in self.compiles),
            "compiles": len(self.compiles),
            "stablehlo_lines": self.program.stablehlo_lines,
            "hlo_lines": self.program.hlo_lines,
            "state_bytes": state_bytes,
            "state_over_params": state_bytes / harness.nbytes(self.params),
            "step_gflop": between / 1e9,
            "refresh_gflop": (most - between) / 1e9,
            "mean_gflop": (between + (most - between) / PERIOD) / 1e9,
            "unread_loops": self.flops.unread_loops,
        }


def flops_between_refreshes(count: FlopCount) -> int:
    """Where nothing is ever refreshed, or every step factorises, this is the costliest step."""
    between = count.most_without_factorisations
    return count.most if between is None else between


def phase_medians(seconds: Sequence[float]) -> list[float]:
    """Milliseconds of each of the `PERIOD` steps of a repeat: medians over the repeats."""
    return [1e3 * statistics.median(seconds[phase::PERIOD]) for phase in range(PERIOD)]


def describe(name: str, contender: Contender, seconds: Sequence[float], best_rate: float) -> dict[str, Any]:
    """One row of the results; ``best_rate`` in GF/s."""
    phases, size = phase_medians(seconds), contender.size()
    step, mean = statistics.median(phases), statistics.mean(phases)
    floor = 1e3 * size["mean_gflop"] / best_rate
    return {
        "name": name,
        "step_ms": step,
        "slowest_ms": max(phases),
        "slowest_over_step": max(phases) / step,
        "mean_ms": mean,
        "step_floor_ms": 1e3 * size["step_gflop"] / best_rate,
        "floor_ms": floor or None,
        "over_floor": mean / floor if floor else None,
        **size,
        "phases_ms": phases,
    }


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """Add each row's mean time over that of the two yardsticks, where they ran."""
    for yardstick in ("optax_muon", "adamw"):
        base = next((row["mean_ms"] for row in rows if row["name"] == yardstick), None)
        for row in rows:
            row[f"over_{yardstick}"] = row["mean_ms"] / base if base else None


def measure(name: str, only: Sequence[str], repeats: int) -> dict[str, Any]:
    """Run every contender in ``only`` on the tree called ``name``."""
    tree, surroundings = TREES[name], harness.environment()
    shapes = make_params(tree)
    contenders, absent = build(only, shapes)
    products = {"square": (1536, 1536, 1536), "own": (tree.width, tree.width, 4 * tree.width)}
    rates: Mapping[str, Callable[[Any], Any]] = {key: harness.matrix_product(*mkn) for key, mkn in products.items()}
    draw = jax.jit(lambda i: random_like(shapes, i))
    drawn = [jax.block_until_ready(draw(i)) for i in range(GRADIENTS)]
    rounds = WARM_UP + PERIOD * repeats
    times = harness.interleaved({**rates, **contenders}, rounds, lambda i: drawn[i % GRADIENTS], f"{name}: step")
    counted = {key: seconds[WARM_UP:] for key, seconds in times.items()}
    gemm = {key: harness.gflops_per_second(*mkn, counted[key]) for key, mkn in products.items()}
    rows = [describe(key, contender, counted[key], max(gemm.values())) for key, contender in contenders.items()]
    compare(rows)
    return {
        "environment": surroundings,
        "tree": {"name": name, **tree._asdict(), "parameters": harness.nbytes(shapes) // 4},
        "repeats": repeats,
        "gemm": {key: {"m_k_n": products[key], "gflops_per_second": rate} for key, rate in gemm.items()},
        "contenders": rows,
        "absent": absent,
    }


def build(only: Sequence[str], shapes: Any) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that can be imported, compiled, and why the others cannot."""
    contenders, absent = {}, {}
    for name in only:
        try:
            tx = CONTENDERS[name]()
        except ModuleNotFoundError as error:
            absent[name] = f"{error.name} is not installed"
        except ImportError as error:
            absent[name] = f"does not import: {error.msg.split(' (')[0]}"
        else:
            contenders[name] = Contender(tx, shapes)
        print(f"{name}: {absent.get(name, 'compiled')}", flush=True)
    for _ in range(COMPILES - 1):
        for contender in contenders.values():
            if contender.program.compile_s < PATIENCE:
                contender.compile()
    return contenders, absent


def random_like(shapes: Any, seed: Any) -> Any:
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time optimizer steps on the parameters of two character GPTs.")
    parser.add_argument("--tree", choices=[*TREES, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=3, help="tens of steps that are timed (default: %(default)s)")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, by commas (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=harness.RESULTS, help="folder of the results (default: %(default)s)"
    )
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(CONTENDERS):
        parser.error(f"--only got {', '.join(sorted(unknown))}; known are {', '.join(CONTENDERS)}")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1; got {options.repeats}")
    jax.config.update("jax_enable_compilation_cache", False)  # a program found on disk would seem to compile in no time
    for name in TREES if options.tree == "all" else [options.tree]:
        results = measure(name, only, options.repeats)
        path = harness.write_results(f"step_time_{name}_{results['environment']['platform']}", results, options.out)
        rates = ", ".join(f"{key} {value['gflops_per_second']:.0f} GF/s" for key, value in results["gemm"].items())
        print(f"\n{harness.table(results['contenders'], COLUMNS)}\nmatrix rates: {rates}; written to {path}\n")


if __name__ == "__main__":
    main()
