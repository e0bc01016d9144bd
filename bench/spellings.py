"""One ViT in random spellings, each held to the canonical one: the same schedule, the same numbers, whole and reduced.

    python -m bench.spellings --cases 1000 --out bench/results/spellings.json

A case takes about a second. First every spelling of every part is tried alone, then parts are drawn together.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import gtp_fx
from bench.environment import Environment
from bench.live_weights import enliven
from bench.output import publish
from bench.spelling_models import CHOICES, GRID, SIDE, Respelt, Spelling
from gtp_fx.options.progress import progress_bar

BUDGET = 0.6
TOLERANCE = 1e-5
"""Largest difference from the canonical spelling's output / largest output: another order of sums, and no more."""


@dataclass(frozen=True)
class Answer:
    """What gtp_fx makes of one spelling.

    schedule: patches removed after each block.
    ratio: FLOPs after / before.
    exact, reduced: outputs at budgets 1.0 and `BUDGET`, of another batch than the example's.
    """

    schedule: tuple[int, ...]
    ratio: float
    exact: Tensor
    reduced: Tensor


def build(spelling: Spelling) -> nn.Module:
    """Build the model; the parameters are the same for every spelling."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return enliven(Respelt(spelling)).eval().requires_grad_(False)


def images(batch: int, seed: int = 0) -> Tensor:
    """Return random images, the same for the same seed."""
    return torch.randn(batch, 3, GRID * SIDE, GRID * SIDE, generator=torch.Generator().manual_seed(seed))


def answer(spelling: Spelling) -> Answer:
    """Optimise a spelling at both budgets and run it on three images, having seen two."""
    model, others = build(spelling), images(3, seed=1)
    exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=images(2), compile=False)
    fast = gtp_fx.optimize(model, flops_budget=BUDGET, example_inputs=images(2), compile=False)
    removed = tuple(site.propagated for site in fast.report.sites)
    return Answer(removed, fast.report.flops_ratio, exact(others), fast(others))


@functools.cache
def canonical() -> Answer:
    """Return the answer for the canonical spelling."""
    return answer(Spelling())


def check(spelling: Spelling) -> str:
    """Hold a spelling to the canonical one. Return "right", "refused: ..." or "wrong: ..."; other errors are raised."""
    wanted = canonical()
    original = build(spelling)(images(3, seed=1))
    try:
        found = answer(spelling)
    except gtp_fx.GtpError as refusal:
        return f"refused: {refusal}"
    if (error := _error(found.exact, original)) > TOLERANCE:
        return f"wrong: moves by {error:.1e} at budget 1.0"
    if found.schedule != wanted.schedule:
        return f"wrong: removes {found.schedule}, the canonical spelling {wanted.schedule}"
    if abs(found.ratio - wanted.ratio) > 1e-3:
        return f"wrong: ratio {found.ratio:.4f}, the canonical spelling's {wanted.ratio:.4f}"
    if (error := _error(found.reduced, wanted.reduced)) > TOLERANCE:
        return f"wrong: {error:.1e} from the canonical spelling at budget {BUDGET}"
    return "right"


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def one_at_a_time() -> Iterator[Spelling]:
    """Yield the canonical spelling with one part written in another way, for every part and way."""
    for part, names in CHOICES.items():
        for name in names[1:]:
            yield dataclasses.replace(Spelling(), **{part: name})


def drawn(count: int, seed: int = 0) -> list[Spelling]:
    """Return `count` spellings: each part alone first, then all parts drawn."""
    generator = random.Random(seed)
    found = list(one_at_a_time())[:count]
    while len(found) < count:
        found.append(Spelling(**{part: generator.choice(names) for part, names in CHOICES.items()}))
    return found


def main(
    count: Annotated[int, typer.Option("--cases", help="How many.")] = 1000,
    seed: Annotated[int, typer.Option(help="Another one draws other spellings.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Check respelt models and write the outcomes. Exit code 1 where one isn't right."""
    outcomes: collections.Counter[str] = collections.Counter()
    failures = []
    start = time.perf_counter()
    with progress_bar() as show, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for done, spelling in enumerate(drawn(count, seed)):
            show(", ".join(f"{number} {name}" for name, number in outcomes.items()), done, count)
            try:
                told = check(spelling)
            except Exception as error:
                told = f"crash: {type(error).__name__}: {error}"
            outcome = told.partition(":")[0]
            outcomes[outcome] += 1
            if outcome != "right":
                failures.append({"spelling": differing(spelling), "what": told})
                typer.echo(f"\n{differing(spelling)}\n  {told[:300]}", err=True)
    for name, number in outcomes.most_common():
        typer.echo(f"{number:5d} {name}", err=True)
    publish(
        {
            "bench": "spellings",
            "cases": count,
            "seed": seed,
            "seconds": time.perf_counter() - start,
            "environment": asdict(Environment.here("cpu")),
            "outcomes": dict(outcomes),
            "failures": failures,
        },
        out,
    )
    if failures:
        raise typer.Exit(1)


def differing(spelling: Spelling) -> dict[str, str]:
    """Return the parts that aren't written canonically."""
    plain = asdict(Spelling())
    return {part: name for part, name in asdict(spelling).items() if name != plain[part]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
