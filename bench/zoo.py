"""Which models does it work on? One row a model: reduced, or refused with the reason that its graph gives.

    python -m bench.zoo --out bench/results/zoo.json --markdown bench/results/zoo.md
    python -m bench.zoo --only swin --only beit --reduced

FLOPs and sites are the full model's, on the meta device: no weights, no arithmetic. What needs numbers runs at reduced
depth with live weights: exactness at budget 1.0, and that both entry points make one schedule and one result. The
command fails where a row is wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gtp_fx
from bench.dynamo_door import Door
from bench.environment import Environment
from bench.live_weights import enliven
from bench.output import publish
from bench.zoo_models import GROUPS, ZOO, ZooModel
from gtp_fx.capture.inputs import call_signature
from gtp_fx.errors import GtpError, InternalError, UnsupportedModelError
from gtp_fx.measure.timing import interleave
from gtp_fx.options.progress import progress_bar

BUDGET = 0.74
DOORS_BUDGET = 0.6
"""For the doors' comparison: at three blocks, dead tokens alone meet a gentler one, and nothing would leave."""
EXACT = 1e-5
"""Largest difference over largest value, in float32: sums in another order."""


@dataclass(frozen=True)
class Row:
    """What happened to one model.

    outcome: "reduced" or "refused". reason: why it was. gflops, ratio: per image before, and after / before at BUDGET.
    sites: attention blocks at which tokens leave, of `blocks`. exact: relative error at budget 1.0, None where even
    that is refused. speed_up_exact: compiled original over compiled exact passes, where timed.
    doors: "agree", or how they differ. wrong: what must not be; the row is good where it is empty.
    """

    name: str
    library: str
    family: str
    outcome: str
    reason: str = ""
    gflops: float | None = None
    ratio: float | None = None
    sites: int = 0
    blocks: int = 0
    exact: float | None = None
    speed_up_exact: float | None = None
    doors: str = ""
    wrong: tuple[str, ...] = field(default=())


def measure(entry: ZooModel, reduced: bool = False, rounds: int = 0) -> Row:
    """One row. reduced: FLOPs at reduced depth too. rounds: of timing at budget 1.0, compiled; 0 for none."""
    try:
        row = _flops(entry, reduced)
        model = enliven(entry.build(True))
        row = replace(row, **_exactness(entry, model, rounds), **_doors(entry, model))
    except Exception as error:  # a crash is a row too, and a wrong one
        crash = f"{type(error).__name__}: {_first_line(error)}"
        return Row(entry.name, entry.library, entry.family, "crashed", wrong=(crash,))
    return replace(row, wrong=tuple(_what_is_wrong(row)))


def _flops(entry: ZooModel, reduced: bool) -> Row:
    try:
        with torch.device("meta"):
            model = entry.build(reduced)
    except NotImplementedError:  # it computes with its weights while it is built
        model = entry.build(reduced).to("meta")
    row = Row(entry.name, entry.library, entry.family, "reduced")
    try:
        report = gtp_fx.optimize(model, flops_budget=BUDGET, example_inputs=_on_meta(entry), compile=False).report
    except InternalError:
        raise
    except GtpError as error:
        return replace(row, outcome="refused", reason=why(error))
    return replace(
        row, gflops=report.flops_before / 1e9, ratio=report.flops_ratio, sites=len(report.sites), blocks=report.blocks
    )


@torch.no_grad()
def _exactness(entry: ZooModel, model: nn.Module, rounds: int) -> dict[str, Any]:
    call = random_call(entry, model)
    try:
        exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=call, compile=False)
    except UnsupportedModelError:
        return {}
    found: dict[str, Any] = {"exact": difference(*(_run(which, call) for which in (exact, model)))}
    if rounds:
        torch._dynamo.reset()
        runs = {name: _bound(torch.compile(which), call) for name, which in (("original", model), ("exact", exact))}
        found["speed_up_exact"] = interleave(runs, rounds=rounds).speed_up("exact", "original").median
    return found


@torch.no_grad()
def _doors(entry: ZooModel, model: nn.Module) -> dict[str, Any]:
    call = random_call(entry, model)
    door = Door(flops_budget=DOORS_BUDGET)
    torch._dynamo.reset()
    try:
        fast = gtp_fx.optimize(model, flops_budget=DOORS_BUDGET, example_inputs=call, compile=False)
    except GtpError as error:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Dynamo tells of a backend's exception, which is what is wanted here
            _swallow(lambda: torch.compile(model, backend=door, fullgraph=True)(**call))
        told = [type(other) for other in door.refused]
        same = not door.made and type(error) in told
        return {"doors": "agree" if same else f"optimize: {type(error).__name__}; Dynamo: {told or 'taken'}"}
    result = _run(torch.compile(model, backend=door, fullgraph=True), call)
    how = "agree"
    if list(door.made[-1].schedule) != list(fast.schedule):
        # Work that images share (a bias made by an MLP) is a smaller part of a batch that is baked in, so its budget is
        # met with fewer tokens gone; with the batch open, both count the same.
        for value in call.values():
            torch._dynamo.mark_dynamic(value, 0)
        torch._dynamo.reset()
        result = _run(torch.compile(model, backend=door, fullgraph=True), call)
        how = "agree, batch open"
    if list(door.made[-1].schedule) != list(fast.schedule):
        return {"doors": f"schedules {list(fast.schedule)} and {list(door.made[-1].schedule)}"}
    apart = difference(result, _run(fast, call))
    return {"doors": how if apart < EXACT else f"apart by {apart:.1e}"}


def _what_is_wrong(row: Row) -> list[str]:
    wrong = []
    if row.outcome == "reduced" and not (row.ratio is not None and row.ratio <= BUDGET):
        wrong.append(f"over budget: {row.ratio}")
    if row.outcome == "refused" and not row.reason:
        wrong.append("refused without a reason")
    if row.exact is not None and not row.exact < EXACT:
        wrong.append(f"not exact at budget 1.0: {row.exact:.1e}")
    if not row.doors.startswith("agree"):
        wrong.append(f"doors: {row.doors}")
    return wrong


def random_call(entry: ZooModel, model: nn.Module) -> dict[str, Tensor]:
    """Noise in the shape of the model's own call."""
    signature = call_signature(model, dict(entry.call) if entry.call is not None else None)
    bound = signature.parameters.bind(*signature.args, **signature.kwargs).arguments
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) for name, value in bound.items()}


def _on_meta(entry: ZooModel) -> dict[str, Tensor] | None:
    return {name: value.to("meta") for name, value in entry.call.items()} if entry.call is not None else None


def difference(found: Any, wanted: Any) -> float:
    """Return the largest difference of two outputs over the largest value of each tensor; inf where shapes differ."""
    mine, theirs = (
        [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)] for output in (found, wanted)
    )
    if [tensor.shape for tensor in mine] != [tensor.shape for tensor in theirs]:
        return float("inf")
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-9)).item() for a, b in zip(mine, theirs, strict=True))


def why(error: GtpError) -> str:
    """The first reason that a refusal gives, in one line."""
    refusals = getattr(error, "refusals", ())
    return str(refusals[0]) if refusals else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _run(model: Any, call: dict[str, Tensor]) -> Any:
    torch.manual_seed(0)  # a masked autoencoder draws its mask
    return model(**call)


def _bound(run: Any, call: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: run(**call)


def _swallow(run: Callable[[], object]) -> None:
    try:
        run()
    except Exception:  # Dynamo wraps what the backend raised, which the door has kept
        return


def table(rows: list[Row], style: str = "simple") -> str:
    """For a person: what can be had of each model."""
    timed = any(row.speed_up_exact for row in rows)
    cells = [
        [
            row.name,
            row.library,
            row.family,
            row.outcome,
            f"{row.gflops:.1f}" if row.gflops else "",
            f"{row.gflops * row.ratio:.1f}" if row.gflops and row.ratio else "",
            f"{row.sites} of {row.blocks}" if row.blocks else "",
            f"{row.exact:.0e}" if row.exact is not None else "refused",
            *([f"{row.speed_up_exact:.2f}×" if row.speed_up_exact else ""] if timed else []),
            row.doors,
            "; ".join(row.wrong) or row.reason,
        ]
        for row in rows
    ]
    headers = ["model", "library", "family", "", "GFLOPs", f"at {BUDGET}", "sites", "error at 1.0"]
    headers += [*(["time at 1.0"] if timed else []), "doors", "why"]
    return tabulate(cells, headers, tablefmt=style, disable_numparse=True)


def summary(rows: list[Row]) -> str:
    """For docs/models.md: which families of each group are reduced and which are refused, as Markdown."""
    by_key = {(row.library, row.name): row for row in rows}
    cells = []
    for group, members in GROUPS.items():
        found = [by_key[model.library, model.name] for model in members]
        reduced = [row.family for row in found if row.outcome == "reduced"]
        refused = [row.family for row in found if row.outcome != "reduced"]
        cells.append([group, _families(reduced), _families(refused)])
    return tabulate(cells, ["", f"reduced to {BUDGET} of the FLOPs", "refused, by name"], tablefmt="github")


def _families(names: list[str]) -> str:
    """ "ViT (3), DeiT": each family once, with how many models of it where they are several."""
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def main(
    only: Annotated[
        list[str] | None, typer.Option(help="Only rows with this in name or family; may be repeated.")
    ] = None,
    reduced: Annotated[bool, typer.Option(help="FLOPs at reduced depth too: quicker.")] = False,
    rounds: Annotated[int, typer.Option(help="Time budget 1.0, compiled, in so many rounds.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
    summarised: Annotated[
        bool, typer.Option("--summary", help="Print the table of docs/models.md as well; needs all rows.")
    ] = False,
) -> None:
    """Run the zoo and print its table; exit status 1 where a row is wrong."""
    wanted = [m for m in ZOO if not only or any(o.lower() in f"{m.name} {m.family}".lower() for o in only)]
    if not wanted:
        raise typer.BadParameter(f"nothing in the zoo has {only} in its name or family", param_hint="--only")
    rows = []
    with progress_bar() as show:
        for done, entry in enumerate(wanted):
            show("zoo", done, len(wanted))
            rows.append(measure(entry, reduced, rounds))
    typer.echo(table(rows))
    counts = {kind: sum(row.outcome == kind for row in rows) for kind in ("reduced", "refused", "crashed")}
    wrong = [row for row in rows if row.wrong]
    typer.echo(
        f"{len(rows)} models: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()) + f"; {len(wrong)} wrong"
    )
    if out is not None:
        environment = asdict(Environment.here("cpu"))
        publish(
            {"bench": "zoo", "flops_budget": BUDGET, "environment": environment, "rows": [asdict(r) for r in rows]}, out
        )
    if markdown is not None:
        markdown.write_text(f"{table(rows, 'github')}\n")
    if summarised:
        typer.echo(summary(rows))
    if wrong:
        raise typer.Exit(1)


command = typer.Typer(add_completion=False)
command.command()(main)

if __name__ == "__main__":
    command()
