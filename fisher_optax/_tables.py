"""Tables as text."""

from collections.abc import Sequence


def table(head: Sequence[str], lines: Sequence[Sequence[str]], total: Sequence[str] | None = None) -> str:
    """Columns as wide as they need to be, under a rule; the total under another."""
    every = [head, *lines, *([total] if total else [])]
    widths = [max(len(line[i]) for line in every) for i in range(len(head))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in every]
    rule = "-" * max(map(len, text))
    end = [rule, text[-1]] if total else []
    return "\n".join([text[0], rule, *text[1 : len(lines) + 1], *end])
