"""A training run on disk: written as it goes, safe to kill, resumed from its last checkpoint."""

import dataclasses
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.plots import plot_losses

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = dict[str, Any]  # one evaluation, a line of metrics.jsonl
Draw = Callable[[list[Row], str, Path], None]  # a picture of the evaluations, with a title, into a PNG file
Config = TypeVar("Config", bound="DataclassInstance")


def versions(*packages: str) -> dict[str, str]:
    """Of Python, of JAX and what it runs on, of the package, and of these."""
    found = {"python": platform.python_version(), "backend": jax.default_backend()}
    for name in ("fisher_optax", "jax", "jaxlib", *packages):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[name] = "not installed"
    return found


def claim(
    path: Path, config: dict[str, Any], parts: Sequence[str], what: str, *, resume: bool, overwrite: bool
) -> None:
    """Makes a folder this program's: with its ``config.json``, and without ``parts`` of another run unless it goes on.

    Raises:
        FileExistsError: it holds ``config.json`` or parts, and neither ``resume`` nor ``overwrite`` is given.
        FileNotFoundError: ``resume`` without a run.
        ValueError: ``resume`` under another configuration; the message lists the differences.
    """
    found = [part for name in ("config.json", *parts) if (part := path / name).exists()]
    if resume:
        require_equal(read_config(path), config, path)
    elif found and not overwrite:
        raise FileExistsError(
            f"{str(path)!r} already holds {what} ({', '.join(p.name for p in found)}). Go on with it by --resume, "
            f"delete it by --overwrite, or give another --out."
        )
    else:
        for part in found:
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        path.mkdir(parents=True, exist_ok=True)
        replace_text(path / "config.json", json.dumps(config, indent=2) + "\n")


class RunFolder:
    """``config.json``, ``metrics.jsonl`` (a line an evaluation), ``checkpoints``, ``loss.png``, a GPT's ``sample.txt``.

    Args:
        path: the folder that holds these; made if need be.
        config: what defines the run, as JSON values, ``optimizer`` among them. A run goes on only under an equal one.
        resume: go on with the run that is there.
        overwrite: delete the run that is there: these five, nothing else in the folder.
        draw: how to draw ``loss.png``.

    Raises:
        FileExistsError: the folder holds a run, and neither ``resume`` nor ``overwrite`` is given.
        FileNotFoundError: ``resume`` without a run.
        ValueError: ``resume`` under another configuration; the message lists the differences.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        draw: Draw = plot_losses,
    ):
        self.metrics, self.plot, self.sample = path / "metrics.jsonl", path / "loss.png", path / "sample.txt"
        self.title, self.draw = f"{config['optimizer']} ({path.name})", draw
        checkpoints = path / "checkpoints"
        parts = (self.metrics, self.plot, self.sample, checkpoints)
        claim(path, config, [part.name for part in parts], "a run", resume=resume, overwrite=overwrite)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self.checkpoints = ocp.CheckpointManager(checkpoints.absolute(), options=options)

    def restore(self, state: Any) -> tuple[Any, list[Row]]:
        """The last checkpoint and the metrics up to it; ``state`` itself and no metrics where there is none yet."""
        step, rows = self.checkpoints.latest_step(), []
        if step is not None:
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = as_if_computed(self.checkpoints.restore(step, args=ocp.args.StandardRestore(shapes)))
            # A checkpoint follows its line. A kill in between leaves lines past it, the last one perhaps cut off.
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            rows = [row for line in lines if line.endswith("\n") and (row := json.loads(line))["step"] <= step]
        replace_text(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        return state, rows

    def record(self, rows: list[Row], state: Any) -> None:
        """Appends the newest of ``rows``, draws the curve and saves ``state`` as the checkpoint of that step."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        self.draw(rows, self.title, self.plot)
        self.checkpoints.save(rows[-1]["step"], args=ocp.args.StandardSave(state))


def as_if_computed(state: Any) -> Any:
    """The same numbers bound to no device: for arrays that are, JAX compiles another program, which may round in
    another way."""

    def copied(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(copied(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jnp.array(np.asarray(x))

    return jax.tree.map(copied, state)


def replace_text(path: Path, text: str) -> None:
    """Writes the whole file or, if killed, leaves it as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of the run in ``path``.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"no run to resume in {str(path)!r}: it has no config.json. Name the run's folder by --out."
        )
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(
            f"{str(file)!r} is damaged ({error}). Begin again with --overwrite or another --out."
        ) from None


def read_config_as(kind: type[Config], path: Path) -> Config:
    """What `read_config` finds, as the dataclass ``kind``; other entries are left out."""
    saved = read_config(path)
    return kind(**{field.name: saved[field.name] for field in dataclasses.fields(kind) if field.name in saved})


def require_equal(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    different = [
        f"{name} is {saved.get(name)!r} there and {wanted.get(name)!r} here"
        for name in {**saved, **wanted}
        if saved.get(name) != wanted.get(name)
    ]
    if different:
        raise ValueError(
            f"cannot resume {str(path)!r} with another configuration: {'; '.join(different)}. Leave the options out to "
            f"take the run's own, or begin a new run in another --out."
        )
