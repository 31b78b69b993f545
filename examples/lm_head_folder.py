"""What `lm_head.py` has found so far, on disk: safe to kill, gone on with bit for bit."""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from tqdm import tqdm

import fisher_optax as fo
from run_folder import as_if_computed, read_config, replace_text, require_equal

# Between two savings of a Fisher that is being added up.
SAVE_EVERY = 8  # batches

PICTURES = ("importance.png", "shift.png", "labels.png", "spectrum.png", "density.png", "blocks.png")
REPORTS = ("report.md", "report.json")


class Results:
    """``config.json``, a folder in ``fishers`` for each diagonal Fisher, a file in ``numbers`` for each other result.

    Args:
        path: the folder that holds these; made if need be.
        config: what defines them, as JSON values. They are used again only under an equal one.
        resume: use what is there.
        overwrite: delete what is there: these, the report and its pictures, nothing else in the folder.

    Raises:
        FileExistsError: the folder holds results, and neither ``resume`` nor ``overwrite`` is given; or another run.
        FileNotFoundError: ``resume`` without results.
        ValueError: ``resume`` under another configuration; the message lists the differences.
    """

    def __init__(self, path: Path, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False):
        self.path, self.fishers, self.parts = path, path / "fishers", path / "numbers"
        file = path / "config.json"
        if file.exists() and not config.keys() <= read_config(path).keys():
            raise FileExistsError(f"{str(path)!r} holds a run of another program. Give another --out.")
        found = [
            p for name in ("config.json", "fishers", "numbers", *REPORTS, *PICTURES) if (p := path / name).exists()
        ]
        if resume:
            require_equal(read_config(path), config, path)
        elif found and not overwrite:
            raise FileExistsError(
                f"{str(path)!r} already holds results ({', '.join(p.name for p in found)}). Go on with them by "
                f"--resume, delete them by --overwrite, or give another --out."
            )
        else:
            for part in found:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            path.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps(config, indent=2) + "\n")

    def fisher(
        self, name: str, loss: Any, params: Any, batches: Iterable[Any], count: int, groups: Any, **how: Any
    ) -> fo.fisher.DiagonalFisher:
        """`fo.fisher.diagonal` of ``count`` batches, from where it was left, saved every `SAVE_EVERY` of them.

        Args:
            name: of the folder, and of the progress bar.
            loss, params, batches, **how: as `fo.fisher.diagonal` takes them.
            groups: a function of a leaf's path and squares.
        """
        with checkpoints(self.fishers / name) as manager:
            state, step = None, manager.latest_step()
            if step is not None:
                path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
                sums = jax.tree_util.tree_map_with_path(lambda p, x: groups(path(p), x), params)
                like = jax.tree.map(ocp.utils.to_shape_dtype_struct, fo.fisher.DiagonalFisher.zeros(sums))
                state = as_if_computed(manager.restore(step, args=ocp.args.StandardRestore(like)))

            def save(state: fo.fisher.DiagonalFisher) -> None:
                if (done := int(state.batches)) % SAVE_EVERY == 0 or done == count:
                    manager.save(done, args=ocp.args.StandardSave(state))

            bar = functools.partial(tqdm, total=count, desc=name, unit="batch")
            return fo.fisher.diagonal(
                loss, params, batches, groups=groups, progress=bar, on_batch=save, resume=state, **how
            )

    def numbers(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``compute`` returns, JSON values; computed only once."""
        file = self.parts / f"{name}.json"
        if not file.exists():
            self.parts.mkdir(exist_ok=True)
            replace_text(file, json.dumps(compute()) + "\n")
        return json.loads(file.read_text(encoding="utf-8"))

    def write(self, report: str, payload: dict[str, Any]) -> None:
        """``report.md`` and ``report.json``; what is not finite is null there."""
        replace_text(self.path / "report.md", report)
        replace_text(self.path / "report.json", json.dumps(_finite(payload), indent=1) + "\n")


def checkpoints(path: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(path.absolute(), options=options)


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
