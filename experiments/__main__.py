"""Lists the experiments: `python -m experiments`."""

import ast
from pathlib import Path


def summaries() -> dict[str, str]:
    """The modules that are programs, and what each does in one line."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}
    programs = {
        name: source for name, source in sources.items() if name != "__main__" and '__name__ == "__main__"' in source
    }
    return {name: (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0] for name, source in programs.items()}


def main() -> None:
    print("python -m experiments.NAME --help says what an experiment takes. NAME is one of\n")
    for name, summary in summaries().items():
        print(f"  {name:20} {summary}")


if __name__ == "__main__":
    main()
