"""One ViT in random spellings, each held to the canonical one: the same schedule, the same numbers, whole and reduced.

    python -m bench.spellings --cases 1000 --out bench/results/spellings.json

A case takes about a second. First every spelling of every part is tried alone, then parts are drawn together.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

import gtp_fx
from bench.live_weights import enliven
from bench.outcomes import tally
from bench.spelt.model import CHOICES, Respelt, Spelling, canonical_of
from bench.spelt.sizes import GRID, SIDE

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
    removed = tuple(site.removed for site in fast.report.sites)
    return Answer(removed, fast.report.flops_ratio, exact(others), fast(others))


@functools.cache
def canonical(spelling: Spelling) -> Answer:
    """Return the answer for a canonical spelling."""
    return answer(spelling)


def check(spelling: Spelling) -> str:
    """Hold a spelling to the canonical one. Return "right", "refused: ..." or "wrong: ..."; other errors are raised."""
    wanted = canonical(canonical_of(spelling))
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
    tally(
        "spellings",
        drawn(count, seed),
        check,
        right=("right",),
        shown=lambda spelling: str(differing(spelling)),
        seed=seed,
        out=out,
    )


def differing(spelling: Spelling) -> dict[str, str]:
    """Return the parts that aren't written canonically."""
    plain = asdict(Spelling())
    return {part: name for part, name in asdict(spelling).items() if name != plain[part]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
