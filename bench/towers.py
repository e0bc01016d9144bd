"""Vision towers in vision-language models: what can be done with each family's, and what prefill costs then.

    python -m bench.towers --out bench/results/towers_1.json

Small models of random weights: the numbers of tokens are those of the schedules, and the times say what the overhead
is, not what a real model would gain. One thread, eager, processor time, rounds interleaved.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import nn

import gtp_fx
from bench.environment import Environment
from bench.vision_language_models import FAMILIES, SMALL, Size, build, prompt

BUDGETS = {"Florence-2": 0.9}
"""FLOPs budgets of the towers, where it isn't 0.6."""


@dataclass
class Row:
    """One family.

    budget: FLOPs budget of the tower.
    before, fewer: tokens of a prefill by the original, and with output="reduced".
    milliseconds: of processor time of the tower and a prefill of one prompt: "original", "full" (the same output) and
        "reduced".
    refused: why a way isn't possible, by "full" and "reduced".
    """

    family: str
    budget: float
    before: int = 0
    fewer: int | None = None
    milliseconds: dict[str, float] | None = None
    refused: dict[str, str] | None = None


def called_with(model: nn.Module, path: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a model calls its tower with, by name."""
    tower, calls = model.get_submodule(path), []
    handle = tower.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        model(**inputs, **_started(model))
    finally:
        handle.remove()
    args, kwargs = calls[0]
    return {**inspect.signature(tower.forward).bind_partial(*args).arguments, **kwargs}


def _started(model: Any) -> dict[str, Any]:
    """Return what an encoder-decoder model's first run needs beside a prompt."""
    return {"decoder_input_ids": torch.full((1, 1), 2)} if model.config.is_encoder_decoder else {}


@torch.no_grad()
def measured(name: str, size: Size, rounds: int) -> Row:
    """Return the row of one family."""
    model, inputs, path = build(name, size), prompt(name, size, batch=1), FAMILIES[name](size).tower
    row = Row(name, BUDGETS.get(name, 0.6), inputs["input_ids"].shape[1], None, {}, {})
    original = model.get_submodule(path)
    runs: dict[str, tuple[nn.Module, dict[str, Any]]] = {"original": (original, inputs)}
    assert row.milliseconds is not None and row.refused is not None
    options: dict[str, Any] = {"flops_budget": row.budget, "compile": False}
    try:
        fast = gtp_fx.optimize(original, example_inputs=called_with(model, path, inputs), **options)
        runs["full"] = fast, inputs
    except gtp_fx.GtpError as error:
        row.refused["full"] = _first_line(error)
    try:
        images = gtp_fx.fewer_image_tokens(model, inputs, tower=path, **options)
        runs["reduced"] = images.tower, images.prompt(inputs)
        row.fewer = runs["reduced"][1]["input_ids"].shape[1]
    except gtp_fx.GtpError as error:
        row.refused["reduced"] = _first_line(error)
    times: dict[str, list[float]] = {how: [] for how in runs}
    for _ in range(rounds + 1):
        for how, (tower, given) in runs.items():
            model.set_submodule(path, tower)
            times[how].append(_seconds(lambda given=given: model(**given, **_started(model))))
    row.milliseconds |= {how: 1e3 * statistics.median(taken[1:]) for how, taken in times.items()}
    return row


def _first_line(error: Exception) -> str:
    """Return what an error says first, without the places of files on this machine."""
    return re.sub(r" \[[^\]]*\.py:[^\]]*\]", "", str(error).splitlines()[0])


def _seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def as_table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    headers = ["family", "tower's FLOPs", "prefill, tokens", "tower and prefill, ms", "same output", "fewer tokens"]
    lines = []
    for row in rows:
        assert row.milliseconds is not None
        took = row.milliseconds
        lines.append(
            [
                row.family,
                f"{row.budget:g}",
                row.before,
                f"{took['original']:.1f}",
                f"{took['full']:.1f} ms" if "full" in took else "refused",
                f"{row.fewer} tokens, {took['reduced']:.1f} ms" if "reduced" in took else "refused",
            ]
        )
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    rounds: Annotated[int, typer.Option(help="Rounds of timing.")] = 9,
) -> None:
    torch.set_num_threads(1)
    rows = []
    for name in FAMILIES:
        rows.append(measured(name, SMALL, rounds))
        typer.echo(as_table(rows[-1:]))
    out.write_text(
        json.dumps({"environment": asdict(Environment.here("cpu")), "rows": [asdict(row) for row in rows]}, indent=1)
        + "\n"
    )
    typer.echo(as_table(rows))


if __name__ == "__main__":
    typer.run(main)
