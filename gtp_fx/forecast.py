"""What a plan is expected to cost, block by block, before anything is compiled: what `gtp-fx plan` prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tabulate import tabulate
from torch import fx, nn

from gtp_fx.axes import whole_count
from gtp_fx.capture import capture_module
from gtp_fx.config import Options
from gtp_fx.cost.chains import counts_behind
from gtp_fx.cost.closed_form import flops_of
from gtp_fx.cost.seconds import branch_seconds, graph_seconds, total_seconds
from gtp_fx.cost.site import lent
from gtp_fx.cost.terms import Term, terms_of
from gtp_fx.damage.calibration import bound
from gtp_fx.inputs import CallSignature, call_signature
from gtp_fx.passes.find_blocks import AttentionBlock, read_blocks
from gtp_fx.pipeline import Exact, run_exact_passes
from gtp_fx.planning import Planned, make_plan
from gtp_fx.schedule import Schedule
from gtp_fx.sites import Candidates, find_sites


@dataclass(frozen=True)
class Cost:
    """flops: per image. seconds: of a run of the batch."""

    flops: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.seconds + other.seconds)


@dataclass(frozen=True)
class BlockForecast:
    """One attention block, up to the next one's start; what lies before the first has block -1.

    tokens_in, leaving: patch tokens, of each window where windows is not 0. before, after: with all its tokens, and with the plan.
    """

    block: int
    layer: str
    tokens_in: int
    leaving: int
    windows: int
    before: Cost
    after: Cost


@dataclass(frozen=True)
class Forecast:
    """original: the model as it came. blocks: behind the exact passes. measured: of what machine the target's curves are, or empty."""

    budget: str
    target: str
    measured: str
    batch: int
    strategy: str
    damage_from: str
    schedule: Schedule
    original: Cost
    blocks: tuple[BlockForecast, ...]

    @property
    def after(self) -> Cost:
        return sum((row.after for row in self.blocks), Cost(0, 0.0))

    def tokens_gone(self, block: int) -> int:
        """Patch tokens that the later half of a block works without."""
        row = next(row for row in self.blocks if row.block == block)
        whole = self.schedule.tokens[block]
        return whole - (row.tokens_in - row.leaving)

    @property
    def flops_ratio(self) -> float:
        return self.after.flops / self.original.flops

    @property
    def speed_up(self) -> float:
        return self.original.seconds / self.after.seconds

    @property
    def share_of_limit(self) -> float:
        """Of what the FLOPs alone would give."""
        return self.speed_up * self.flops_ratio

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {**asdict(self), "after": asdict(self.after), "flops_ratio": self.flops_ratio}
        return {**found, "speed_up": self.speed_up, "share_of_limit": self.share_of_limit}

    def __str__(self) -> str:
        rows = [_row(row, self.batch) for row in self.blocks]
        total = ["", "together", "", "", "", *_costs(sum((r.before for r in self.blocks), Cost(0, 0.0)), self.after)]
        headers = ["block", "layer", "patches in", "leave", "out", "GFLOPs", "then", "ms", "then", "of limit"]
        table = tabulate([*rows, total], headers, disable_numparse=True, colalign=("right", "left", *("right",) * 8))
        rates = (
            f"measured {self.measured}" if self.measured else "from its table: `gtp-fx tune` measures it where it is"
        )
        return "\n".join(
            [
                f"{self.budget}: {self.original.flops / 1e9:.3f} GFLOPs per image, {self.after.flops / 1e9:.3f} then: "
                f"{self.flops_ratio:.4f}, a limit of {1 / self.flops_ratio:.3f}×",
                f"predicted for {self.batch} images, compiled: {self.original.seconds * 1e3:.4g} ms, "
                f"{self.after.seconds * 1e3:.4g} ms then: {self.speed_up:.3f}×, {self.share_of_limit:.1%} of the limit",
                f"target {self.target} ({rates}); strategy {self.strategy}",
                *([f"schedule: least damage expected by {self.damage_from}"] if self.damage_from else []),
                "",
                table,
                "the last block's row has the head in it; ms and GFLOPs are with the exact passes done",
            ]
        )


class Planner:
    """A captured model, to be planned for any number of budgets and targets."""

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        self._signature: CallSignature = call_signature(model, example_inputs)
        self._captured = capture_module(model, self._signature, training=False)

    def plan(self, options: Options) -> Forecast:
        """Raises what `optimize` raises for the same options."""
        if options.calibration is not None:
            options = replace(options, calibration=bound(options.calibration, self._signature.canonical))
        exact = run_exact_passes(self._captured, options)
        planned = make_plan(exact.graph_module, options, exact.original)
        return forecast(exact, planned, options)


def forecast(exact: Exact, planned: Planned, options: Options) -> Forecast:
    """Of a plan, from the graph that it was made for."""
    graph, target, batch = exact.graph_module.graph, options.target, options.batch
    blocks = read_blocks(exact.graph_module)
    original = Cost(exact.original.flops, graph_seconds(exact.original.graph, target, batch))
    found = find_sites(graph, blocks, options.strategy)
    counts = [planned.plan.schedule.propagated[site.block] for site in found.sites]
    owner = _owners(graph, blocks)
    flops = _by_block(found, counts, owner, options, flops_of, 1)
    seconds = _by_block(found, counts, owner, options, lambda works: total_seconds(works, target), batch)
    skipped = branch_seconds(graph, found.sites, options.strategy, target, batch, found)
    for site, count in zip(found.sites, counts, strict=True):
        if site.branch is not None:
            flops[site.block][1] += site.branch.change(count)
            seconds[site.block][1] += skipped[site.block][site.branch.tokens - count]
    for number, scoring in lent(found.sites, counts).items():
        flops[number][1] += scoring
    rows = []
    left = {site.stream: site.whole for site in found.sites}
    by_block = {site.block: (site, count) for site, count in zip(found.sites, counts, strict=True)}
    for number in range(-1, len(blocks)):
        before, after = (Cost(int(flops[number][i]), float(seconds[number][i])) for i in (0, 1))
        if number < 0:
            rows.append(BlockForecast(number, "before the blocks", 0, 0, 0, before, after))
            continue
        axis = blocks[number].axis
        tokens, count, windows = left.get(axis.domain.grid, axis.domain.whole_count), 0, 0
        if number in by_block:
            site, count = by_block[number]
            tokens, windows = left[site.stream], site.branch.windows if site.branch is not None else 0
            left[site.stream] -= count
        rows.append(BlockForecast(number, blocks[number].layer, tokens, count, windows, before, after))
    return Forecast(
        budget=options.budget,
        target=target.name,
        measured=target.measured,
        batch=batch,
        strategy=str(options.strategy),
        damage_from=planned.damage_from,
        schedule=planned.plan.schedule,
        original=original,
        blocks=tuple(rows),
    )


def _by_block(
    found: Candidates,
    counts: Sequence[int],
    owner: Callable[[Term], int],
    options: Options,
    weigh: Callable[[Any], Any],
    batch: int,
) -> dict[int, list[Any]]:
    """[with every token, with the plan] by block; branches are left out."""
    behind = counts_behind(found.sites, counts)
    spent: dict[int, list[Any]] = defaultdict(lambda: [0, 0])
    graph = next(iter(found.typing.answers)).graph
    for term in terms_of(graph, found.typing, found.sites, options.strategy, batch):
        row = spent[owner(term) if term.site is None else found.sites[term.site].block]
        if term.site is None:
            row[0] += weigh(term.works(whole_count))
        elif not counts[term.site] or (
            term.first and behind(found.sites[term.site].domain) < found.sites[term.site].whole
        ):
            continue
        row[1] += weigh(term.works(behind))
    return spent


def _owners(graph: fx.Graph, blocks: Sequence[AttentionBlock]) -> Callable[[Term], int]:
    """Which block a term belongs to: the last one whose stream is there already."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    starts = [order[block.stream if block.stream is not None else block.attention] for block in blocks]

    def owner(term: Term) -> int:
        position = order[term.node] if term.node is not None else -1
        return sum(start < position for start in starts) - 1

    return owner


def _row(row: BlockForecast, batch: int) -> list[str]:
    number = str(row.block) if row.block >= 0 else ""
    tokens = ["", "", ""] if row.block < 0 else [str(row.tokens_in), str(row.leaving), str(row.tokens_in - row.leaving)]
    if row.windows:
        tokens = [f"{row.windows}×{row.tokens_in}", str(row.leaving), f"{row.windows}×{row.tokens_in - row.leaving}"]
    return [number, row.layer, *tokens, *_costs(row.before, row.after)]


def _costs(before: Cost, after: Cost) -> list[str]:
    """Share of the limit: the speed-up over what the FLOPs alone would give; of what loses none, nothing."""
    share = ""
    if after.flops < before.flops and after.seconds > 0:
        share = f"{before.seconds / after.seconds * after.flops / before.flops:.0%}"
    costs = [f"{before.flops / 1e9:.3f}", f"{after.flops / 1e9:.3f}"]
    return [*costs, f"{before.seconds * 1e3:.3g}", f"{after.seconds * 1e3:.3g}", share]
