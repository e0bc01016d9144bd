"""Launches, bytes and modelled time that GTP adds to a model on an H100, from the code that Inductor generates.

    python -m bench.gpu_traffic --out bench/results/x.json --table bench/results/x.md

It needs no GPU. Code is generated, but not compiled, for three graphs of each model: the original; the optimised one,
lowered as for a GPU; and the optimised one without GTP's operators (`bench.gpu_groups.bare`), which has the same token
counts. Launches and bytes are counted. SECONDS ARE MODELLED, NOT MEASURED (`bench.gpu_time_model`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from tabulate import tabulate

from bench.absent_gpu import absent_h100, fake_on_gpu
from bench.environment import Environment
from bench.generated_code import generate
from bench.gpu_groups import Group, bare, mark
from bench.gpu_time_model import GpuModel
from bench.launches import Launch
from bench.output import publish
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.errors import GtpError
from gtp_fx.model.backend import lowered  # type: ignore[attr-defined]  # as the door for GPUs lowers
from gtp_fx.model.pipeline import run_passes
from gtp_fx.options.options import Options

NOTICE = "Launches and bytes are counted in generated code; seconds are modelled, not measured."
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Net:
    """A model.

    name: timm's name.
    side: side of its images, in pixels.
    batch: images per run, unless another number is given.
    made_with: arguments of `timm.create_model`.
    schedule: removed tokens at each attention block; "auto" for the budget's schedule.
    """

    name: str
    side: int
    batch: int
    made_with: Mapping[str, Any] = field(default_factory=dict)
    schedule: str | Sequence[int] = "auto"


NETS = (
    Net("deit_small_patch16_224", 224, 256),
    Net("deit_base_patch16_224", 224, 256),
    Net("vit_large_patch16_384", 384, 64),
    Net("vit_base_patch14_dinov2", 518, 32),
)
_SMALL = {"img_size": 96, "depth": 2, "embed_dim": 64, "num_heads": 2}
DRY_NETS = (Net("vit_tiny_patch16_224", 96, 8, _SMALL, (12, 0)),)


@dataclass(frozen=True)
class Amount:
    """Cost of some launches.

    launches: their number.
    bytes: bytes read and written.
    seconds: modelled time.
    flops: FLOPs of products and attention.
    """

    launches: int = 0
    bytes: int = 0
    seconds: float = 0.0
    flops: int = 0

    @classmethod
    def of(cls, launches: Iterable[Launch], model: GpuModel) -> Amount:
        """Return the sum over launches."""
        each = list(launches)
        seconds = sum(map(model.seconds, each))
        return cls(len(each), sum(x.bytes for x in each), seconds, sum(x.work.flops for x in each))

    def __sub__(self, other: Amount) -> Amount:
        return Amount(*(mine - theirs for mine, theirs in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[Any, ...]:
        return self.launches, self.bytes, self.seconds, self.flops


@dataclass(frozen=True)
class Traffic:
    """Launches of one model at one batch.

    model: timm's name.
    side: side of its images, in pixels.
    batch: images per run.
    schedule: removed tokens at each attention block.
    flops_ratio: FLOPs of the optimised model / the original's.
    planned: speed-up predicted by gtp_fx's cost model.
    original: launches of the original.
    bare: launches of the optimised graph without GTP's operators, with the same token counts.
    optimised: launches of the optimised graph.
    """

    model: str
    side: int
    batch: int
    schedule: tuple[int, ...]
    flops_ratio: float
    planned: float
    original: tuple[Launch, ...]
    bare: tuple[Launch, ...]
    optimised: tuple[Launch, ...]

    def amounts(self, model: GpuModel) -> dict[str, Amount]:
        return {name: Amount.of(getattr(self, name), model) for name in ("original", "bare", "optimised")}

    def added(self, model: GpuModel) -> dict[Group, Amount]:
        """Return the cost of GTP's operators by group: the optimised graph's launches minus the bare one's."""

        def of(launches: Sequence[Launch], group: Group) -> Amount:
            return Amount.of((launch for launch in launches if Group.of(launch) is group), model)

        return {group: of(self.optimised, group) - of(self.bare, group) for group in Group}

    def to_dict(self, model: GpuModel) -> dict[str, Any]:
        total = self.amounts(model)
        return {
            "model": self.model,
            "side": self.side,
            "batch": self.batch,
            "schedule": list(self.schedule),
            "flops_ratio": self.flops_ratio,
            **{name: asdict(amount) for name, amount in total.items()},
            "added": {group.name: asdict(amount) for group, amount in self.added(model).items()},
            "added_in_all": asdict(total["optimised"] - total["bare"]),
            "speed_up": total["original"].seconds / total["optimised"].seconds,
            "speed_up_without_operators": total["original"].seconds / total["bare"].seconds,
            "speed_up_planned": self.planned,
            "kernels": {name: _by_kernel(getattr(self, name), model) for name in total},
        }


def _by_kernel(launches: Sequence[Launch], model: GpuModel) -> list[dict[str, Any]]:
    """Return the cost of each kernel in each group, in the order of their first launch."""
    kinds = dict.fromkeys((Group.of(launch), launch.kernel, launch.kind) for launch in launches)
    rows = []
    for group, kernel, kind in kinds:
        mine = [x for x in launches if (Group.of(x), x.kernel, x.kind) == (group, kernel, kind)]
        rows.append({"group": group.name, "kernel": kernel, "kind": kind, **asdict(Amount.of(mine, model))})
    return rows


def count(net: Net, batch: int, budget: float, keep: Path | None = None) -> Traffic:
    """Generate code for a model's three graphs and return their launches.

    budget: FLOPs budget, for a net with an "auto" schedule.
    keep: folder for the code.
    """
    with torch.device("meta"):
        made = timm.create_model(net.name, **net.made_with).to(DTYPE)
    fake = fake_on_gpu(made)
    captured = capture_module(fake.module, call_signature(fake.module, fake.images(2, net.side, DTYPE)))
    how: dict[str, Any] = {"flops_budget": budget} if net.schedule == "auto" else {"schedule": net.schedule}
    optimised = run_passes(captured, Options.of(**how, strategy="gtp", target="h100", batch=batch))
    marked = mark(optimised.graph_module)
    with absent_h100():
        on_gpu = mark(lowered(marked, torch.device("cuda")))
    images = [fake.images(batch, net.side, DTYPE)]
    graphs = {"original": captured, "bare": bare(marked), "optimised": on_gpu}
    launches = {}
    for name, graph in graphs.items():
        file = None if keep is None else keep / f"{net.name}_b{batch}_{name}.py"
        launches[name] = generate(graph, images, file).launches
    forecast = optimised.report.forecast
    assert forecast is not None, "the pipeline gives every report one"
    schedule = tuple(optimised.schedule)
    return Traffic(net.name, net.side, batch, schedule, forecast.flops_ratio, forecast.speed_up, **launches)


def main(
    model: Annotated[list[str] | None, typer.Option(help="Only these of the models.")] = None,
    batch: Annotated[int | None, typer.Option(help="Instead of each model's own.")] = None,
    budget: Annotated[float, typer.Option(help="FLOPs after / before at most, in (0, 1].")] = 0.74,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="A toy model of two blocks.")] = False,
    code: Annotated[Path | None, typer.Option(help="Keep the generated code in this folder.")] = None,
    table: Annotated[Path | None, typer.Option(help="Write the table to this file, as Markdown.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file, after every model.")] = None,
) -> None:
    """Count what GTP adds to models on an H100, in generated code, and model its time."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        _fail("with TRITON_INTERPRET=1 kernels are Python and not launched: unset it")
    nets = [net for net in (DRY_NETS if dry_run else NETS) if not model or net.name in model]
    if not nets:
        _fail(f"--model {', '.join(model or [])}: give some of {', '.join(net.name for net in NETS)}")
    time_model = GpuModel()
    found: list[Traffic] = []
    for net in nets:
        try:
            found.append(count(net, batch or net.batch, budget, code))
        except GtpError as error:
            _fail(str(error))
        typer.echo(f"{net.name}: done", err=True)
        if out is not None:
            publish(_as_dict(found, time_model, budget), out)
    text = f"{report(found, time_model)}\n\n{NOTICE}\n{Environment.here('cpu')}"
    typer.echo(text)
    if table is not None:
        table.write_text(f"# What GTP adds on an H100: {budget:g} of the FLOPs, bfloat16\n\n{text}\n")


def report(found: Sequence[Traffic], model: GpuModel) -> str:
    """Return two Markdown tables: what GTP adds, by group, and the resulting times and speed-ups."""
    headers = ["added", *(part for x in found for part in (f"{_short(x)} launches, MB", "us (of the original)"))]
    lines = [[group.value, *_cells(found, model, group)] for group in Group]
    lines.append(["all", *_cells(found, model, None)])
    totals = []
    for x in found:
        amount, row = x.amounts(model), x.to_dict(model)
        parts = [f"{amount[name].seconds * 1e3:.2f} ({amount[name].launches})" for name in amount]
        gains = (row[key] for key in ("speed_up_without_operators", "speed_up", "speed_up_planned"))
        removed = ", ".join(f"{count}@{block}" for block, count in enumerate(x.schedule) if count)
        totals.append([_short(x), removed, f"{x.flops_ratio:.3f}", *parts, *(f"{gain:.3f}" for gain in gains)])
    names = ["model", "leave", "FLOPs", "original, ms (launches)", "without GTP's operators", "optimised"]
    names += ["speed-up without them", "speed-up", "as planned"]
    parts = [
        tabulate(rows, head, tablefmt="github", disable_numparse=True)
        for rows, head in ((lines, headers), (totals, names))
    ]
    return "\n\n".join(parts)


def _cells(found: Sequence[Traffic], model: GpuModel, group: Group | None) -> list[str]:
    cells = []
    for x in found:
        total = x.amounts(model)
        more = total["optimised"] - total["bare"] if group is None else x.added(model)[group]
        share = more.seconds / total["original"].seconds
        cells += [f"{more.launches:+d}, {more.bytes / 1e6:+.0f}", f"{more.seconds * 1e6:+.0f} ({share:+.1%})"]
    return cells


def _short(x: Traffic) -> str:
    return f"{x.model.split('_patch')[0]} {x.side} b{x.batch}"


def _as_dict(found: Sequence[Traffic], model: GpuModel, budget: float) -> dict[str, Any]:
    return {
        "bench": "gpu_traffic",
        "notice": NOTICE,
        "device": "h100, absent",
        "dtype": str(DTYPE).removeprefix("torch."),
        "flops_budget": budget,
        "environment": asdict(Environment.here("cpu")),
        "time_model": asdict(model),
        "models": [x.to_dict(model) for x in found],
    }


def _fail(why: str) -> None:
    typer.echo(f"gpu_traffic: {why}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
