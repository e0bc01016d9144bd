"""Benchmark: what does each strategy cost in accuracy, without fine-tuning, at equal FLOPs?

    python -m bench.accuracy --out bench/results/accuracy.json --plot bench/results/accuracy.png \\
        --table bench/results/accuracy.md --data cifar10.tar.xz --weights cifar10_postnorm.pth

It runs every strategy of `bench.contenders` on every schedule and budget, on the nets of `bench.digit_nets`, which are
trained in a minute or two each where the cache doesn't have them, and on one net that somebody else trained on
photographs (`bench.photographs`), where --data and --weights say where these are. Scores are on canvases of digits, or
photographs, that no net has seen. One process per core works on (net, seed) pairs. Rows that --out has already are not
measured again, so that seeds and strategies can be added later. `bench.accuracy_times` adds compiled time.

`--strategy auto` adds strategy="auto", which chooses strategy and schedule on 64 calibration images: canvases of the
calibration split, or training photographs, without their labels. The report compares it with the best of the others in
hindsight.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, fx, nn

from bench import photograph_nets
from bench.contenders import ASKED_FOR, CALIBRATED, CHOSEN, CONTENDERS, Contender, contenders
from bench.digit_nets import NETS, load_or_train
from bench.digits import Split
from bench.environment import Environment
from bench.output import publish
from bench.photograph_nets import PHOTOGRAPH_NETS, resized
from bench.photographs import load_net, load_photographs
from bench.tasks import TASKS, Task, outputs_of
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.errors import BudgetError, UnsupportedModelError
from gtp_fx.model.pipeline import run_passes
from gtp_fx.options.calibration import Calibration, bound
from gtp_fx.options.options import Options
from gtp_fx.options.progress import progress_bar
from gtp_fx.plan.damage.divergence import divergence

BUDGETS = (0.85, 0.7, 0.55, 0.4, 0.3)
_CALIBRATION = 64
"""Images without labels that strategy="auto" may look at."""
PHOTOGRAPHS = "photographs"
SUBJECTS = (*NETS, PHOTOGRAPHS, *PHOTOGRAPH_NETS)
"""Names of nets: those trained here in minutes, the one of `bench.photographs`, and those that train for an hour."""


@dataclass(frozen=True)
class Photographs:
    """Where photographs are, and the net of `bench.photographs`.

    data: photographs, a folder or a tar. weights: the net's state dict; None where that net isn't measured.
    """

    data: Path
    weights: Path | None = None


@dataclass(frozen=True)
class Subject:
    """A net and the images that it is judged by.

    class_token: whether it has one. unlabelled: images for calibration, as `measure` needs them.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    task: Task
    class_token: bool
    unlabelled: Tensor


@dataclass(frozen=True)
class Row:
    """Result of one strategy on one schedule, for one net and seed, at one budget.

    net: a name in `SUBJECTS`.
    seed: seed of the net's training; 0 where somebody else trained it.
    strategy, schedule: as in `bench.contenders.Contender`.
    budget: FLOPs budget, as a share of the original's.
    base: the original's score, in [0, 1].
    flops_ratio: FLOPs of the optimised model / the original's.
    score: the optimised model's score, in [0, 1].
    moved: divergence of the outputs from the original's: in nats for logits, in relative squares otherwise.
    counts: removed tokens at each attention block.
    refusal: why there is no score, or "".
    chosen: the strategy in words, where it was chosen.
    """

    net: str
    seed: int
    strategy: str
    schedule: str
    budget: float
    base: float
    flops_ratio: float = 0.0
    score: float = 0.0
    moved: float = 0.0
    counts: tuple[int, ...] = ()
    refusal: str = ""
    chosen: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what identifies the row."""
        return self.net, self.seed, self.strategy, self.schedule, self.budget


def main(
    seed: Annotated[
        list[int] | None, typer.Option(help="Seeds, each its own nets; 0, 1 and 2 where none is given.")
    ] = None,
    net: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(SUBJECTS)}; all but those of bench.photograph_nets where none is given."),
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join((*CONTENDERS, *ASKED_FOR, CHOSEN))}; all but the last two.")
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Instead of 0.85, 0.7, 0.55, 0.4 and 0.3.")] = None,
    test_images: Annotated[int, typer.Option(help="Canvases or photographs that scores are measured on.")] = 1000,
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as JPEGs, a folder or a tar, for photographs.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Of the net for them (`bench.photographs`).")] = None,
    workers: Annotated[int, typer.Option(help="Processes; one a core where 0.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file; rows it has stay.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw scores against FLOPs to this PNG.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write the table to this Markdown file.")] = None,
) -> None:
    """Measure the score that every strategy keeps."""
    from bench import accuracy_report

    for given, known in ((net, SUBJECTS), (strategy, (*CONTENDERS, *ASKED_FOR, CHOSEN))):
        if unknown := [value for value in given or [] if value not in known]:
            raise typer.BadParameter(f"{unknown[0]!r} is unknown; give some of {', '.join(known)}")
    photographs = None if data is None else Photographs(data, weights)
    if photographs is None and (trained := [name for name in net or () if name in PHOTOGRAPH_NETS]):
        raise typer.BadParameter(f"{trained[0]} needs --data, which isn't part of this repository")
    has_other = photographs is not None and weights is not None
    if not has_other and (net is None or PHOTOGRAPHS in net):
        lacking = f"{PHOTOGRAPHS} needs --data and --weights, which aren't part of this repository"
        if net is not None:
            raise typer.BadParameter(lacking)
        typer.echo(f"left out: {lacking}", err=True)
    rows = {row.key: row for row in known_rows(out)}
    asked = contenders(strategy or CONTENDERS)
    budgets = tuple(budget or BUDGETS)
    pairs = [(name, number) for number in seed or (0, 1, 2) for name in net or NETS if name != PHOTOGRAPHS]
    if has_other and (net is None or PHOTOGRAPHS in net):
        pairs.append((PHOTOGRAPHS, 0))
    jobs = [(name, number, [c for c in asked if _is_missing(rows, name, number, c, budgets)]) for name, number in pairs]
    waiting = [job for job in jobs if job[2]]
    for found in _worked_at(waiting, budgets, test_images, photographs, workers or os.cpu_count() or 1):
        rows |= {row.key: row for row in found}
        _write(list(rows.values()), test_images, out)
    every = sorted(rows.values(), key=lambda row: (SUBJECTS.index(row.net), row.seed))
    text = accuracy_report.markdown(every)
    typer.echo(text, err=out is None)
    if out is None:
        _write(every, test_images, None)
    if table is not None:
        table.write_text(text + "\n")
    if plot is not None:
        accuracy_report.draw(every, plot)


def measure(
    name: str,
    seed: int,
    asked: Sequence[Contender],
    budgets: Sequence[float],
    test_images: int,
    photographs: Photographs | None = None,
) -> list[Row]:
    """Return the rows of all contenders at all budgets on one net."""
    torch.set_num_threads(1)  # the nets are too small for a second thread to help
    of = _subject(name, seed, test_images, photographs)
    original = outputs_of(of.model, of.images)
    base = of.task.score(original, of.labels)
    signature = call_signature(of.model, of.images[:2])
    captured = capture_module(of.model, signature)
    calibration = bound(Calibration(of.unlabelled, progress=False), signature.canonical)
    rows = []
    for contender in asked:
        for ratio in budgets:
            key = (name, seed, contender.strategy, contender.schedule, ratio, base)
            try:
                found = _optimised(captured, contender, ratio, of.class_token, calibration)
            except (BudgetError, UnsupportedModelError) as error:
                rows.append(Row(*key, refusal=str(error).splitlines()[0]))
                continue
            outputs = outputs_of(found.graph_module, of.images)
            score, moved = of.task.score(outputs, of.labels), divergence(outputs, original)
            chosen = str(found.strategy) if contender.schedule == CALIBRATED else ""
            rows.append(Row(*key, found.report.flops_ratio, score, moved, tuple(found.schedule), chosen=chosen))
    return rows


def _subject(name: str, seed: int, test_images: int, photographs: Photographs | None) -> Subject:
    """Return a net by its name in `SUBJECTS`, and its images."""
    if name == PHOTOGRAPHS:
        assert photographs is not None and photographs.weights is not None, "main() asks for --data and --weights"
        images, labels = load_photographs(photographs.data, "test", test_images // 10)
        net, unlabelled = load_net(photographs.weights), _unlabelled(photographs.data)
        return Subject(net, images, labels, TASKS["digits"], class_token=True, unlabelled=unlabelled)
    if name in PHOTOGRAPH_NETS:
        assert photographs is not None, "main() asks for --data"
        sides = PHOTOGRAPH_NETS[name]
        images, labels = load_photographs(photographs.data, "test", test_images // 10)
        unlabelled = resized(_unlabelled(photographs.data), sides)
        trained = photograph_nets.load_or_train(name, seed, photographs.data)
        return Subject(trained, resized(images, sides), labels, TASKS["digits"], sides.class_token, unlabelled)
    config = NETS[name]
    task = TASKS[config.task]
    images, labels = task.draw(Split.test, 0, test_images, config.look, config.patch)
    unlabelled, _ = task.draw(Split.calibration, 0, _CALIBRATION, config.look, config.patch)
    return Subject(load_or_train(config, seed), images, labels, task, config.class_token, unlabelled)


def _unlabelled(data: Path) -> Tensor:
    """Return photographs of the training split for calibration, of all classes."""
    some = load_photographs(data, "train", _CALIBRATION // 10 + 1)[0]
    return some[:: max(1, len(some) // _CALIBRATION)][:_CALIBRATION]


def _optimised(
    captured: fx.GraphModule, contender: Contender, ratio: float, class_token: bool, calibration: Calibration
) -> Any:
    """Return the optimised graph. One capture serves every strategy, since passes don't change their input."""
    options: dict[str, Any] = {"flops_budget": ratio, "strategy": contender.made(class_token)}
    if contender.schedule == CALIBRATED:
        return run_passes(captured, Options.of(**options, calibration=calibration))
    return run_passes(captured, Options.of(**options, schedule=contender.schedule))


def _worked_at(
    jobs: Sequence[tuple[str, int, list[Contender]]],
    budgets: tuple[float, ...],
    test_images: int,
    photographs: Photographs | None,
    workers: int,
) -> Iterator[list[Row]]:
    """Run the jobs in parallel processes and yield the rows of each when it is done."""
    with progress_bar() as show, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = {pool.submit(measure, *job, budgets, test_images, photographs): job[:2] for job in jobs}
        show("nets", 0, len(jobs))
        for done, future in enumerate(as_completed(waiting), start=1):
            yield future.result()
            show("nets", done, len(jobs))


def _is_missing(rows: dict[Any, Row], name: str, seed: int, contender: Contender, budgets: tuple[float, ...]) -> bool:
    """Return whether `rows` lacks a budget of this contender on this net and seed."""
    return any((name, seed, contender.strategy, contender.schedule, ratio) not in rows for ratio in budgets)


def known_rows(out: Path | None) -> list[Row]:
    """Return the rows of an earlier result file; none where there is no file."""
    if out is None or not out.exists():
        return []
    return [Row(**{**row, "counts": tuple(row["counts"])}) for row in json.loads(out.read_text())["rows"]]


def _write(rows: Sequence[Row], test_images: int, out: Path | None) -> None:
    result = {
        "bench": "accuracy",
        "nets": {name: asdict(NETS[name]) for name in dict.fromkeys(row.net for row in rows) if name in NETS},
        "test_images": test_images,
        "environment": asdict(Environment.here("cpu")),
        "rows": [asdict(row) for row in rows],
    }
    publish(result, out)


if __name__ == "__main__":
    typer.run(main)
