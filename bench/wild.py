"""Does it keep its promises on models whose authors never heard of it? One row a class of a real library.

    pip install -e '.[wild]'
    pip install --no-deps vformer dinov2 depth-anything-3 sam3 vit-prisma pytorchvideo  # they pin old or odd versions
    python -m bench.wild --out bench/results/wild.json --jobs 2
    python -m bench.wild --only birder --only 'vit_3d'

Every class is built small, with live weights, and measured by `bench.wild_row`: reduced, or refused by name. WRONG and
CRASH are faults, and the command fails where there is one. A library that isn't installed gives skipped rows. Rows that
--out has already, at this commit, are not measured again; with --again nor are those of other commits, but for the
verdicts that it names. Each row says at which commit it was measured.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from tabulate import tabulate

from bench.environment import Environment
from bench.output import publish
from bench.wild_models import every
from bench.wild_row import BUDGET, VERDICTS, Row
from bench.wild_workers import SECONDS, measured
from gtp_fx.options.progress import progress_bar

FAULTS = ("WRONG", "CRASH")


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="Only rows with this in library or name; may be repeated.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes at a time, each of one thread.")] = 1,
    limit: Annotated[float, typer.Option(help="Seconds until a row is given up.")] = SECONDS,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON after each; those it has stay.")] = None,
    again: Annotated[
        list[str] | None,
        typer.Option(help="Keep --out's rows of other commits, but those with this verdict; may be repeated."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
    summarised: Annotated[bool, typer.Option("--summary", help="Print the table of docs/models.md as well.")] = False,
) -> None:
    """Measure the classes and print their table; exit status 1 where one is wrong or crashed."""
    asked = [m for m in every() if not only or any(o.lower() in f"{m.library} {m.name}".lower() for o in only)]
    if not asked:
        raise typer.BadParameter(f"no class has {only} in its library or name", param_hint="--only")
    environment = asdict(Environment.here("cpu"))
    rows = _known(out)
    verdicts = VERDICTS if again is None else again
    needed = {model.key for model in asked if _is_due(rows.get(model.key), environment["commit"], verdicts)}
    numbers = [number for number, model in enumerate(every()) if model.key in needed]
    with progress_bar() as show:
        for done, row in enumerate(measured(numbers, jobs, limit)):
            rows[row.library, row.name] = replace(row, commit=environment["commit"])
            show("wild", done + 1, len(numbers))
            if out is not None:
                _write(rows, environment, out)
    found = [rows[model.key] for model in asked]
    typer.echo(table(found))
    typer.echo(counts(found))
    if markdown is not None:
        markdown.write_text(f"{table(found, 'github')}\n")
    if summarised:
        typer.echo(summary(found))
    if any(row.verdict in FAULTS for row in found):
        raise typer.Exit(1)


def _known(out: Path | None) -> dict[tuple[str, str], Row]:
    """Return the rows that the file has."""
    if out is None or not out.exists():
        return {}
    written = json.loads(out.read_text())
    rows = [replace(Row(**row), commit=row.get("commit", written["environment"]["commit"])) for row in written["rows"]]
    return {(row.library, row.name): row for row in rows}


def _is_due(row: Row | None, commit: str, verdicts: Sequence[str]) -> bool:
    """Tell whether an entry has to be measured. verdicts: those to measure again where they are of another commit."""
    if row is None or row.verdict == "skipped":
        return True
    return row.commit != commit and row.verdict in verdicts


def _write(rows: dict[tuple[str, str], Row], environment: dict[str, Any], out: Path) -> None:
    ordered = [asdict(rows[model.key]) for model in every() if model.key in rows]
    publish(
        {
            "bench": "wild",
            "flops_budget": BUDGET,
            "dtype": "float32",
            "environment": environment,
            "libraries": _versions({row["library"] for row in ordered}),
            "rows": ordered,
        },
        out,
    )


def _versions(libraries: set[str]) -> dict[str, str]:
    found = {}
    for library in sorted(libraries):
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    return found


def table(rows: Sequence[Row], style: str = "simple") -> str:
    """For a person: what became of each class."""
    cells = [
        [
            row.library,
            row.name,
            row.verdict,
            f"{row.exact:.0e}" if row.exact is not None else "",
            f"{row.ratio:.3f}" if row.ratio is not None else "",
            f"{row.moved:.2f}" if row.moved is not None else "",
            f"{row.sites} of {row.blocks}" if row.blocks else "",
            row.dynamo,
            f"{row.seconds:.0f}",
            row.message,
        ]
        for row in rows
    ]
    headers = ["library", "class", "", "error at 1.0", f"at {BUDGET}", "moved", "sites", "Dynamo", "s", "why"]
    return tabulate(cells, headers, tablefmt=style, disable_numparse=True)


def summary(rows: Sequence[Row]) -> str:
    """For docs/models.md: by library, how many classes are reduced, how far, and how many refused."""
    cells = []
    for library in dict.fromkeys(row.library for row in rows):
        mine = [row for row in rows if row.library == library]
        at = Counter(row.verdict for row in mine)
        exact = sum(row.verdict == "refused" and row.exact is not None for row in mine)
        faults = at["WRONG"] + at["CRASH"]
        cells.append([library, len(mine), at["reduced"], at["lowest"], exact, at["refused"] - exact, faults])
    cells.append(["all", *(sum(row[column] for row in cells) for column in range(1, 7))])
    reduced = [f"reduced to {BUDGET}", "to their lowest, above that"]
    headers = ["library", "classes", *reduced, "exact passes alone", "refused", "wrong or crashed"]
    return tabulate(cells, headers, tablefmt="github")


def counts(rows: Sequence[Row]) -> str:
    """ "155 classes: 90 reduced, 65 refused, 0 WRONG, 0 CRASH, 0 skipped" and the processor time."""
    at = Counter(row.verdict for row in rows)
    told = ", ".join(f"{at[verdict]} {verdict}" for verdict in VERDICTS)
    return f"{len(rows)} classes: {told}; {sum(row.seconds for row in rows):.0f} s of processor time"


command = typer.Typer(add_completion=False)
command.command()(main)

if __name__ == "__main__":
    command()
