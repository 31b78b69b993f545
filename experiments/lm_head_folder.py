"""What `lm_head.py` has found so far, on disk: safe to kill, gone on with bit for bit."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from tqdm import tqdm

import fisher_optax as fo
from experiments import results_folder
from experiments.run_folder import as_if_computed

# Between two savings of a Fisher that is being added up.
SAVE_EVERY = 8  # batches

PICTURES = ("importance.png", "shift.png", "labels.png", "spectrum.png", "density.png", "blocks.png")


class Results(results_folder.Results):
    """Also a folder in ``fishers`` for each diagonal Fisher."""

    def __init__(self, path: Path, config: dict[str, Any], *, resume: bool = False, overwrite: bool = False):
        super().__init__(path, config, resume=resume, overwrite=overwrite, others=("fishers", *PICTURES))
        self.fishers = path / "fishers"

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


def checkpoints(path: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(path.absolute(), options=options)
