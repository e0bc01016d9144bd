"""Cases that are drawn, checked one by one, and counted by outcome: what `bench.fuzz` and `bench.spellings` share."""

from __future__ import annotations

import collections
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import typer

from bench.environment import Environment
from bench.output import publish
from gtp_fx.options.progress import progress_bar

Case = TypeVar("Case")


def tally(
    bench: str,
    cases: Sequence[Case],
    check: Callable[[Case], str],
    *,
    right: Collection[str],
    shown: Callable[[Case], str] = repr,
    seed: int,
    out: Path | None,
) -> None:
    """Check every case, print and publish the outcomes. Exit code 1 where one isn't among those that are `right`.

    check: returns "outcome" or "outcome: why"; an exception is the outcome "broken".
    shown: what reproduces a case.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, str]] = []
    refusals: list[dict[str, str]] = []
    start = time.perf_counter()
    with progress_bar() as show, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for done, case in enumerate(cases):
            show(", ".join(f"{number} {name}" for name, number in outcomes.items()), done, len(cases))
            where = ""
            try:
                outcome, _, why = check(case).partition(": ")
            except Exception as error:
                outcome, why = "broken", f"{type(error).__name__}: {error}"
                where = "\n".join(traceback.format_exc().strip().splitlines()[-12:])
            outcomes[outcome] += 1
            if outcome not in right:
                failures.append({"case": shown(case), "error": why, "where": where})
                typer.echo(f"\n{shown(case)}\n  {outcome}: {why}", err=True)
            elif outcome == "refused":
                refusals.append({"case": shown(case), "why": why})
    for name, number in outcomes.most_common():
        typer.echo(f"{number:5d} {name}", err=True)
    publish(
        {
            "bench": bench,
            "cases": len(cases),
            "seed": seed,
            "seconds": time.perf_counter() - start,
            "environment": asdict(Environment.here("cpu")),
            "outcomes": dict(outcomes),
            "failures": failures,
            "refusals": refusals,
        },
        out,
    )
    if failures:
        raise typer.Exit(1)
