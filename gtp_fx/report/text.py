"""Text for a terminal of 80 columns: tables, numbers, and values in a paragraph."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence

WIDTH = 80
_FEWEST = 12
"""Letters that are left of the widest column's entries, however wide the others are."""


def table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], left: Collection[int] = (0,), shortened: int | None = None
) -> str:
    """Return a table with two spaces between its columns.

    headers: of one line or several; shorter ones stand at the bottom.
    left: columns that are aligned to the left; the others hold numbers.
    shortened: column whose entries lose their beginnings where the table would be wider than 80 columns: paths of
        layers, which differ at their ends.
    """
    deep = max(header.count("\n") for header in headers) + 1
    heads = [["", *[""] * (deep - 2 - header.count("\n")), *header.split("\n")][-deep:] for header in headers]
    lines = [[head[level] for head in heads] for level in range(deep)] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    over = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    if shortened is not None and over > 0:
        widths[shortened] = most = max(widths[shortened] - over, _FEWEST)
        for line in lines:
            line[shortened] = line[shortened] if len(line[shortened]) <= most else "…" + line[shortened][1 - most :]
    lines.insert(deep, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def number(value: float) -> str:
    """Return a number to three digits, or to the unit, never as 1.17e+03: 0.371, 12.4, 1145."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def described(name: str, values: str) -> list[str]:
    """Return a strategy as lines: its name, then its values, where it has some.

    values: as Python writes it, "GTP(alpha=0.1, …)".
    """
    inside = values.partition("(")[2].removesuffix(")")
    return [f"strategy {name}", *textwrap.wrap(inside, WIDTH, initial_indent="  ", subsequent_indent="  ")]
