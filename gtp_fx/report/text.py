"""Text for a terminal: tables of 80 columns, numbers, and paragraphs as wide as the terminal is."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Collection, Iterable, Sequence

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


def wrapped(text: str) -> str:
    """Return text with each of its lines wrapped at the terminal's width, or at 80 columns where there is no terminal.

    A line's continuations stand under its beginning; those of a list's entry ("- …") under what it says. Long words,
    such as paths, stay whole.
    """
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    lines = []
    for line in text.split("\n"):
        words = line.lstrip(" ")
        indent = " " * (len(line) - len(words) + 2 * words.startswith("- "))
        lines.append(
            textwrap.fill(
                line,
                max(width, _FEWEST),
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=True,
            )
        )
    return "\n".join(lines)


def listed(heading: str, entries: Iterable[object]) -> list[str]:
    """Return the lines of a heading and a list below it, after an empty line; none where there are no entries."""
    lines = [wrapped(f"  - {entry}") for entry in entries]
    return ["", heading, *lines] if lines else []


def number(value: float) -> str:
    """Return a number to three digits, or to the unit, never as 1.17e+03: 0.371, 12.4, 1145."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def described(name: str, values: str) -> list[str]:
    """Return a strategy as lines: its name, then its values, where it has some.

    values: as Python writes it, "GTP(alpha=0.1, …)".
    """
    inside = values.partition("(")[2].removesuffix(")")
    return [f"strategy {name}", *(wrapped(f"  {inside}").split("\n") if inside else [])]
