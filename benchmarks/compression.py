"""What the documents say of pruning and merging: the examples at their defaults, with what they ran on.

    python -m benchmarks.compression --run runs/gpt

`pruning` compares magnitude, Wanda, SparseGPT and OBS on the GPT of ``examples/train_gpt.py`` (trained first, in about
two and a half minutes, if ``--run`` does not name one); `merging` compares ways to merge two small CNNs tuned apart. An
interrupted run goes on where it was. Writes ``pruning_gpt`` and ``merging_digits``, ``.json`` and ``.png``.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import merge_tasks  # noqa: E402
import prune_gpt  # noqa: E402
from benchmarks import harness  # noqa: E402

TASKS = ("distortions", "classes")


def report_of(example: Any, out: Path, options: list[str]) -> dict[str, Any]:
    """What an example writes into ``out``, which it may have begun before."""
    example.main([*options, f"--out={out}", *(["--resume"] if (out / "config.json").exists() else [])])
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def pruning(work: Path, run: str | None, out: Path) -> None:
    environment = harness.environment()
    report = report_of(prune_gpt, work / "pruned", [f"--run={run}"] if run else [])
    kept = {name: report[name] for name in ("config", "steps", "dense", "table", "orders")}
    kept["config"] = {name: value for name, value in kept["config"].items() if name != "run"}
    print("written:", harness.write_results("pruning_gpt", {"environment": environment, **kept}, out))
    shutil.copy(work / "pruned" / prune_gpt.PICTURE, out / "pruning_gpt.png")


def merging(work: Path, out: Path) -> None:
    results: dict[str, Any] = {"environment": harness.environment()}
    for tasks in TASKS:
        folder = work / f"merged-{tasks}"
        report = report_of(merge_tasks, folder, [f"--tasks={tasks}"])
        results[tasks] = {name: value for name, value in report.items() if name != "seeds"}
    shutil.copy(work / f"merged-{TASKS[0]}" / merge_tasks.PICTURE, out / "merging_digits.png")
    print("written:", harness.write_results("merging_digits", results, out))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("pruning", "merging"))
    parser.add_argument("--run", help="folder of a run of train_gpt.py")
    parser.add_argument("--work", type=Path, default=Path("runs/compression"), help="what the examples write")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    args = parser.parse_args()
    if args.only != "merging":
        pruning(args.work, args.run, args.out)
    if args.only != "pruning":
        merging(args.work, args.out)


if __name__ == "__main__":
    main()
