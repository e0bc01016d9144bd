"""Top-1 and top-5 of a model and of what gtp_fx makes of it, on a real image set; without labels their agreement.

    python -m bench.imagenet --model deit_small_patch16_224 --pretrained --data imagenet/val --flops-budget 0.74
    python -m bench.imagenet --model … --pretrained --data photographs --flops-budget 0.74 --agreement-only
    torchrun --nproc-per-node 8 -m bench.imagenet --model … --data … --flops-budget 0.74 --device cuda

timm's own transforms for the model, bfloat16, compiled. With --state FILE an interrupted run continues where it
stopped, and the original's outputs are kept for the next strategy. Under torchrun processes share the images; the
counts are the same as one process finds. `gtp-fx eval` compares several budgets and strategies at once, in one process.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from tabulate import tabulate
from torch import Tensor

import gtp_fx
from bench.environment import Environment
from bench.output import publish
from gtp_fx.cli.weights import load_model
from gtp_fx.errors import CheckError, GtpError, OptionError
from gtp_fx.measure.benchmark import ORIGINAL
from gtp_fx.measure.evaluation.base_outputs import BaseOutputs, folder_for
from gtp_fx.measure.evaluation.data import Data
from gtp_fx.measure.evaluation.evaluate import folder_of_images, identity
from gtp_fx.measure.evaluation.found import Outputs, Sums
from gtp_fx.measure.evaluation.intervals import Estimate
from gtp_fx.measure.evaluation.passing import evaluate_on
from gtp_fx.measure.evaluation.record import Record
from gtp_fx.measure.evaluation.subject import Subject
from gtp_fx.options.options import DEFAULTS
from gtp_fx.options.progress import progress_bar

_WARM_UP = 3
"""Batches that aren't timed: compiling, and what the first calls allocate."""


@dataclass(frozen=True)
class Workers:
    """This process among those of torchrun; one alone without it."""

    rank: int
    count: int

    def total(self, sums: Sums, device: torch.device) -> Sums:
        """Sums over all processes."""
        if self.count == 1:
            return sums
        values = torch.tensor(astuple(sums), dtype=torch.float64, device=device)
        dist.all_reduce(values)
        return Sums(*values.tolist())

    def share(self, data: Data) -> Data:
        """Of the images that are asked for, this process's."""
        return replace(data, batches=lambda places: data.batches(sorted(places or ())[self.rank :: self.count]))


@dataclass
class Clocked:
    """A model that keeps the seconds of every call but the first ones."""

    model: Callable[[Tensor], Any]
    device: torch.device
    seconds: list[float] = field(default_factory=list)
    calls: int = 0

    def __call__(self, images: Tensor) -> Any:
        started = _now(self.device)
        output = self.model(images)
        spent = _now(self.device) - started
        self.calls += 1
        if self.calls > _WARM_UP:
            self.seconds.append(spent)
        return output

    def rate(self, batch: int) -> float | None:
        """Images a second; None where there were too few batches."""
        return batch / statistics.median(self.seconds) if self.seconds else None


def main(
    model: Annotated[str, typer.Option(help="timm's name of it.")],
    data: Annotated[Path, typer.Option(help="A folder of class folders, of images, or of webdataset shards.")],
    flops_budget: Annotated[float, typer.Option(help="In (0, 1].")],
    strategy: Annotated[str, typer.Option(help="A strategy's name.")] = DEFAULTS["strategy"],
    schedule: Annotated[str, typer.Option(help="auto, uniform or even.")] = "auto",
    pretrained: Annotated[bool, typer.Option(help="timm's weights, downloaded.")] = False,
    weights: Annotated[Path | None, typer.Option(help="Or weights from a file.")] = None,
    class_map: Annotated[
        Path | None, typer.Option(help="Folder names, one a line, in the order of the outputs.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1)] = 128,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images.")] = 4,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    compile: Annotated[bool, typer.Option(help="Compile both models.")] = True,
    agreement_only: Annotated[
        bool, typer.Option("--agreement-only", help="Labels aren't needed: how often both models say the same.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many images, evenly spaced.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Keep what is found in files of this name, and go on from them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Evaluate a model and its optimised form."""
    try:
        with _processes(device) as us:
            place = (
                torch.device(device, us.rank % torch.cuda.device_count()) if device == "cuda" else torch.device(device)
            )
            loaded = load_model(model, pretrained=pretrained, weights=weights)
            subject = Subject.of(loaded.model.to(place, getattr(torch, dtype)), None)
            original, classes = subject.model, int(loaded.model.num_classes)
            if not classes:
                raise OptionError(f"{model} has no classes: gtp-fx eval compares features")
            images, prepared = folder_of_images(
                original, data, classes, class_map=class_map, limit=limit, transform=None, batch=batch, workers=workers
            )
            if images.unlabelled and not agreement_only:
                raise OptionError(
                    f"data {str(data)!r} has no labels for this model: {images.unlabelled}; --agreement-only needs none"
                )
            options: dict[str, Any] = {"flops_budget": flops_budget, "strategy": strategy, "schedule": schedule}
            optimised = gtp_fx.optimize(original, **options, compile=compile)
            about = {**identity(subject, images, prepared, Outputs.classes, compile), "model": model}
            run = {
                **about,
                "origin": loaded.weights_origin,
                "agreement_only": agreement_only,
                "flops_budget": flops_budget,
                "strategy": str(optimised.strategy),
                "schedule": list(optimised.schedule),
            }
            record = Record.of(state, run, us.rank)
            before = set(record.found)
            if us.count > 1:
                dist.barrier()  # nobody writes before everybody has read
            models = {
                ORIGINAL: Clocked(torch.compile(original) if compile else original, place),
                "optimised": Clocked(optimised, place),
            }
            kept = folder_for(optimised.captured_graph.code, about) / f"{us.rank}of{us.count}"
            with progress_bar(us.rank == 0) as show, torch.no_grad():
                _, _, wrong = evaluate_on(
                    us.share(images),
                    models,
                    {"optimised": record},
                    Outputs.classes,
                    BaseOutputs(kept, images.images or 0),
                    subject.placed,
                    size=batch if compile else 0,
                    progress=show,
                )
            for reason in wrong.values():
                raise CheckError(reason)
            new, old = ([row for at, row in record.found.items() if (at in before) is known] for known in (False, True))
            sums = us.total(Sums.of(new), place).plus(astuple(Sums.of(old)))
            rates = {name: clocked.rate(batch) for name, clocked in models.items()}
            if us.rank == 0:
                _publish(run, sums, rates, optimised.report.flops_ratio, us.count, device, batch, out)
    except (GtpError, CheckError) as error:
        typer.echo(f"imagenet: {error}", err=True)
        raise typer.Exit(2) from error


def _publish(
    run: dict[str, object],
    sums: Sums,
    rates: dict[str, float | None],
    ratio: float,
    processes: int,
    device: str,
    batch: int,
    out: Path | None,
) -> None:
    told = [f"{rate:.1f}" if rate else "not timed" for rate in rates.values()]
    same, moved = _percent(sums.agreement), sums.mean_divergence
    below = (
        f"{int(sums.images)} images, {ratio:.4f} of the FLOPs; same class for {same}; divergence {moved.value:.4g} "
        f"({moved.low:.4g} – {moved.high:.4g}); 95 % intervals; {processes} processes, batch {batch}"
    )
    estimates = {"same": sums.agreement, "divergence": moved}
    if run["agreement_only"]:
        rows, headers = [[ORIGINAL, told[0]], ["optimised", told[1]]], ["", "images/s a process"]
    else:
        (one, five), (now_one, now_five) = sums.original, sums.optimised
        rows = [
            [ORIGINAL, _percent(one), _percent(five), told[0]],
            ["optimised", _percent(now_one), _percent(now_five), told[1]],
        ]
        headers = ["", "top-1", "top-5", "images/s a process"]
        below += (
            f"; right before alone {int(sums.lost)}, since alone {int(sums.won)}: {_percent(sums.gained, '+')} of top-1"
        )
        estimates |= {"original_1": one, "original_5": five, "optimised_1": now_one, "optimised_5": now_five}
        estimates["gained"] = sums.gained
    typer.echo(f"{tabulate(rows, headers, disable_numparse=True)}\n{below}", err=out is None)
    counts = sums.counts()
    result = {
        "bench": "imagenet",
        **run,
        "flops_ratio": ratio,
        "counts": {name: counts[name] for name in ("images", "same")} if run["agreement_only"] else counts,
        "estimates": {name: asdict(estimate) for name, estimate in estimates.items()},
        "images_per_second": rates,
        "batch": batch,
        "processes": processes,
        "environment": asdict(Environment.here(device)),
    }
    publish(result, out)


def _percent(estimate: Estimate, sign: str = "") -> str:
    value, low, high = (f"{100 * part:{sign}.2f}" for part in astuple(estimate))
    return f"{value} % ({low} – {high})"


@contextlib.contextmanager
def _processes(device: str) -> Iterator[Workers]:
    """torchrun's processes, where it started this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Workers(0, 1)
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Workers(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    typer.run(main)
