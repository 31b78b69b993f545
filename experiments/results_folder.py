"""What an experiment has measured so far, on disk: safe to kill, and gone on with."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.run_folder import claim, read_config, replace_text

REPORTS = ("report.md", "report.json")


class Results:
    """``config.json``, a file in ``numbers`` for each result, ``report.md`` and ``report.json``.

    Args:
        path: the folder that holds these; made if need be.
        config: what defines them, as JSON values. They are used again only under an equal one.
        resume: use what is there.
        overwrite: delete what is there: these and ``others``, nothing else in the folder.
        others: what else the experiment writes, pictures and the like.

    Raises:
        FileExistsError: the folder holds results, and neither ``resume`` nor ``overwrite`` is given; or another run.
        FileNotFoundError: ``resume`` without results.
        ValueError: ``resume`` under another configuration; the message lists the differences.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        others: Sequence[str] = (),
    ):
        self.path, self.parts = path, path / "numbers"
        if (path / "config.json").exists() and not config.keys() <= read_config(path).keys():
            raise FileExistsError(f"{str(path)!r} holds a run of another program. Give another --out.")
        claim(path, config, ["numbers", *REPORTS, *others], "results", resume=resume, overwrite=overwrite)

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


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _finite(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
