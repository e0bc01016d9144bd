"""Random vision transformers x budgets x strategies, checked against what gtp_fx promises for every model.

    python -m bench.fuzz --cases 1000 --out bench/results/fuzz.json
    python -m bench.fuzz --cases 1000 --spellings   # one ViT in random spellings

A case takes some seconds, a thousand of them a night. A failure is printed as the `Case` that reproduces it; add it to
tests/bench/test_fuzz.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from bench import fuzz_models as models
from bench import spellings
from bench.fuzz_checks import Case, check
from bench.fuzz_models import Architecture
from bench.outcomes import tally
from gtp_fx.options.options import DEFAULTS
from gtp_fx.strategies import STRATEGIES

BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6)


@st.composite
def architectures(draw: Any) -> Architecture:
    """Draw a consistent architecture: heads divide, windows divide the grid, a CLS token exists where it is read."""
    window = draw(st.sampled_from((0, 0, 0, 2, 3)))
    sides = st.integers(1, 3).map(lambda n: n * window) if window else st.integers(3, 9)
    key_heads = draw(st.integers(1, 3))
    heads = key_heads * draw(st.sampled_from((1, 1, 2, 4)))
    attention = draw(st.sampled_from(models.ATTENTIONS))
    positions = [p for p in models.POSITIONS if attention != "multihead" or p not in ("rotary", "bias")]
    prefix = 0 if window else draw(st.integers(0, 5))
    pools = [p for p in models.POOLS if prefix or p not in ("token", "tokens and logits")]
    return Architecture(
        grid=(draw(sides), draw(sides)),
        prefix=prefix,
        suffix=0 if window else draw(st.sampled_from((0, 0, 0, 1, 3))),
        depth=draw(st.integers(1, 4)),
        heads=heads,
        key_heads=key_heads,
        sharing=draw(st.sampled_from(models.SHARINGS)),
        head=draw(st.sampled_from((8, 16, 24))),
        embed=draw(st.sampled_from(models.EMBEDS)),
        position=draw(st.sampled_from([p for p in positions if not window or p != "rotary"])),
        attention=attention,
        projections=draw(st.sampled_from(models.PROJECTIONS)),
        query_key_norm=draw(st.sampled_from(("", "", "layer", "rms"))),
        order=draw(st.sampled_from(models.ORDERS)),
        layer_scale=draw(st.booleans()),
        mlp=draw(st.sampled_from(models.MLPS)),
        norm=draw(st.sampled_from(models.NORMS)),
        window=window,
        shift=draw(st.booleans()),
        pool=draw(st.sampled_from(pools)),
        dtype=draw(st.sampled_from(("float32", "float32", "float64", "bfloat16"))),
        beside=draw(st.sampled_from(("", "", *models.BESIDE))),
        parting=draw(st.sampled_from(models.PARTINGS)),
        region=draw(st.sampled_from(("", *models.REGIONS))),
        keeps=draw(st.sampled_from((False, False, True))),
        broken=draw(st.sampled_from((False, False, False, True))),
    )


@st.composite
def cases(draw: Any, compiled: st.SearchStrategy[bool]) -> Case:
    """Draw a case. Half of them use the default, or GTP as published.

    In windowed models, few other strategies work, so few are tried.
    """
    architecture = draw(architectures())
    usual = [DEFAULTS["strategy"], "gtp"]
    others = [name for name in STRATEGIES if name not in usual]
    if architecture.window:
        others = ["topk", "idle", draw(st.sampled_from(others))]
    return Case(
        architecture=architecture,
        flops_budget=draw(st.sampled_from(BUDGETS)),
        strategy=draw(st.sampled_from((usual * len(others))[: len(others)] + others)),
        batch=draw(st.integers(2, 4)),
        compiled=draw(compiled),
    )


def drawn(count: int, first: int = 0, compiled: float = 0.0) -> list[Case]:
    """Return `count` cases, the same for the same seed.

    Hypothesis varies each example a few times before it draws a new one, so only every tenth is taken.

    first: seed.
    compiled: share of cases that Inductor compiles too.
    """
    found: list[Case] = []
    every = round(1 / compiled) if compiled else 0
    chosen = st.integers(1, every).map(lambda n: n == every) if every else st.just(False)

    @seed(first)
    @settings(
        max_examples=10 * count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(chosen))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found[9::10]


def main(
    count: Annotated[int, typer.Option("--cases", help="How many.")] = 1000,
    first: Annotated[int, typer.Option("--seed", help="Another one gives other cases.")] = 0,
    compiled: Annotated[
        float, typer.Option(help="Share of cases that Inductor compiles, too: ten times as long.")
    ] = 0.05,
    respelt: Annotated[bool, typer.Option("--spellings", help="Draw spellings of one ViT: `bench.spellings`.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Check random models and write the outcomes. Exit code 1 where a check fails."""
    if respelt:
        spellings.main(count, first, out)
        return
    tally("fuzz", drawn(count, first, compiled), check, right=("reduced", "exact", "refused"), seed=first, out=out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
