"""Top-1 and top-5 of a model and of what gtp_fx makes of it, on a real image set.

    python -m bench.imagenet --model deit_small_patch16_224 --pretrained --data imagenet/val --flops-budget 0.74
    torchrun --nproc-per-node 8 -m bench.imagenet --model … --data … --flops-budget 0.74 --device cuda

timm's own transforms for the model, bfloat16, compiled. With --state FILE an interrupted run continues where it
stopped. Under torchrun processes share the images; the counts are the same as one process finds.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import timm.data
import torch
import torch.distributed as dist
import typer
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gtp_fx
from bench.environment import Environment
from bench.imagenet_data import DataError, ImageSet, Transformed, read_set
from bench.imagenet_record import Found, Record, StateError
from bench.output import publish
from gtp_fx.cli.weights import load_model
from gtp_fx.errors import GtpError
from gtp_fx.options.options import DEFAULTS
from gtp_fx.options.progress import progress_bar

_WARM_UP = 3
"""Batches that aren't timed: compiling, and what the first calls allocate."""


@dataclass(frozen=True)
class Workers:
    """This process among those of torchrun; one alone without it."""

    rank: int
    count: int

    def total(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """Sums over all processes."""
        values = torch.tensor(numbers, dtype=torch.int64, device=device)
        if self.count > 1:
            dist.all_reduce(values)
        return [int(value) for value in values]


@dataclass(frozen=True)
class Score:
    """Of `images` images, how many were right, and the 95 % interval of the share that is (Wilson's)."""

    right: int
    images: int

    @property
    def share(self) -> float:
        return self.right / max(self.images, 1)

    @property
    def interval(self) -> tuple[float, float]:
        z, n = 1.959964, max(self.images, 1)
        middle = (self.share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (self.share * (1 - self.share) / n + z * z / (4 * n * n)) ** 0.5
        return middle - half, middle + half

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.share:.2f} % ({100 * low:.2f} – {100 * high:.2f})"


def main(
    model: Annotated[str, typer.Option(help="timm's name of it.")],
    data: Annotated[Path, typer.Option(help="A folder of class folders, or of webdataset shards.")],
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
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first images.")] = None,
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
            config = timm.data.resolve_model_data_config(loaded.model)
            original = loaded.model.to(place, getattr(torch, dtype))
            images = read_set(data, int(original.num_classes), class_map)
            if limit is not None:
                images = ImageSet(images.root, images.items[:limit])
            blank = torch.zeros(2, *config["input_size"], device=place, dtype=getattr(torch, dtype))
            options: dict[str, Any] = {"flops_budget": flops_budget, "strategy": strategy, "schedule": schedule}
            optimised = gtp_fx.optimize(original, **options, example_inputs=blank, compile=compile)
            run = {
                "model": model,
                "weights": loaded.weights_origin,
                "data": images.fingerprint,
                "images": len(images.items),
                "class_map": "" if class_map is None else hashlib.sha256(class_map.read_bytes()).hexdigest()[:16],
                "dtype": dtype,
                "flops_budget": flops_budget,
                "strategy": str(optimised.strategy),
                "schedule": list(optimised.schedule),
            }
            record = Record.of(state, run, us.rank)
            before = set(record.found)
            if us.count > 1:
                dist.barrier()  # nobody writes before everybody has read
            transform = timm.data.create_transform(**config, is_training=False)
            todo = [i for i in range(len(images.items)) if i not in before][us.rank :: us.count]
            loader = DataLoader(Transformed(images, todo, transform), batch, num_workers=workers)
            baseline: Any = torch.compile(original) if compile else original
            seconds = _evaluate(baseline, optimised, loader, record, place, getattr(torch, dtype), us.rank == 0)
            rates = {name: batch / statistics.median(times) if times else None for name, times in seconds.items()}
            new = [row for place_, row in record.found.items() if place_ not in before]
            old = [row for place_, row in record.found.items() if place_ in before]
            counts = [a + b for a, b in zip(us.total(_counts(new), place), _counts(old), strict=True)]
            if us.rank == 0:
                _publish(run, counts, rates, optimised.report.flops_ratio, us.count, device, batch, out)
    except (GtpError, DataError, StateError) as error:
        typer.echo(f"imagenet: {error}", err=True)
        raise typer.Exit(2) from error


@torch.no_grad()
def _evaluate(
    original: nn.Module,
    optimised: nn.Module,
    loader: DataLoader[Any],
    record: Record,
    device: torch.device,
    dtype: torch.dtype,
    shown: bool,
) -> dict[str, list[float]]:
    """Seconds of every full batch but the first ones; what is found goes to the record."""
    seconds: dict[str, list[float]] = {"original": [], "optimised": []}
    with progress_bar(shown) as show:
        for number, (images, labels, places) in enumerate(loader):
            images = images.to(device, dtype)
            best = {}
            for name, model in (("original", original), ("optimised", optimised)):
                started = _now(device)
                outputs = model(images)
                spent = _now(device) - started
                if number >= _WARM_UP and len(images) == loader.batch_size:
                    seconds[name].append(spent)
                best[name] = outputs.float().topk(min(5, outputs.shape[1]), dim=1).indices.cpu()
            record.add(_found(best["original"], best["optimised"], labels, places))
            show("images", (number + 1) * (loader.batch_size or 1), len(loader) * (loader.batch_size or 1))
    return seconds


def _found(original_B5: Tensor, optimised_B5: Tensor, labels_B: Tensor, places_B: Tensor) -> Iterator[Found]:
    rows = zip(original_B5.tolist(), optimised_B5.tolist(), labels_B.tolist(), places_B.tolist(), strict=True)
    for mine, theirs, label, place in rows:
        yield Found(place, mine[0] == label, label in mine, theirs[0] == label, label in theirs, mine[0] == theirs[0])


def _counts(rows: Sequence[Found]) -> list[int]:
    """Images; right at 1 and 5 by each model; same class; right by the one alone."""
    return [
        len(rows),
        sum(r.original_1 for r in rows),
        sum(r.original_5 for r in rows),
        sum(r.optimised_1 for r in rows),
        sum(r.optimised_5 for r in rows),
        sum(r.same for r in rows),
        sum(r.original_1 and not r.optimised_1 for r in rows),
        sum(r.optimised_1 and not r.original_1 for r in rows),
    ]


def _publish(
    run: dict[str, object],
    counts: list[int],
    rates: dict[str, float | None],
    ratio: float,
    processes: int,
    device: str,
    batch: int,
    out: Path | None,
) -> None:
    images, *right, same, lost, won = counts
    scores = [Score(count, images) for count in right]
    told = [f"{rate:.1f}" if rate else "too few batches" for rate in rates.values()]
    rows = [["original", *scores[:2], told[0]], ["optimised", *scores[2:], told[1]]]
    table = tabulate(rows, ["", "top-1", "top-5", "images/s a process"], disable_numparse=True)
    told_below = (
        f"{images} images, {ratio:.4f} of the FLOPs; same class for {same / max(images, 1):.2%}; "
        f"right before alone {lost}, since alone {won}; 95 % intervals; {processes} processes, batch {batch}"
    )
    typer.echo(f"{table}\n{told_below}", err=out is None)
    names = ("images", "original_1", "original_5", "optimised_1", "optimised_5", "same", "lost", "won")
    result = {
        "bench": "imagenet",
        **run,
        "flops_ratio": ratio,
        "counts": dict(zip(names, counts, strict=True)),
        "intervals": {name: score.interval for name, score in zip(names[1:5], scores, strict=True)},
        "images_per_second": rates,
        "batch": batch,
        "processes": processes,
        "environment": asdict(Environment.here(device)),
    }
    publish(result, out)


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
