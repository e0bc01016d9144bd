"""What a plan is expected to cost, block by block, before anything is compiled: what `gtp-fx plan` prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from gtp_fx.errors import Refusal
from gtp_fx.options.schedule import Schedule


@dataclass(frozen=True)
class Cost:
    """flops: per image. seconds: of a run of the batch."""

    flops: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.seconds + other.seconds)


def ratio(part: float, whole: float) -> float:
    """Divide; 1 where nothing is left to compare with: a graph may do no work that is counted (a head that only takes the class token)."""
    return part / whole if whole else 1.0


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
    """original: the model as it came. blocks: behind the exact passes. measured: of what machine the target's curves are, or empty. refusals: what
    was left as it was, and why."""

    budget: str
    target: str
    measured: str
    batch: int
    strategy: str
    damage_from: str
    schedule: Schedule
    original: Cost
    blocks: tuple[BlockForecast, ...]
    refusals: tuple[Refusal, ...] = ()

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
        return ratio(self.after.flops, self.original.flops)

    @property
    def speed_up(self) -> float:
        return ratio(self.original.seconds, self.after.seconds)

    @property
    def slower(self) -> str:
        """A sentence where the plan is predicted to lose time; empty where it gains some."""
        if self.speed_up >= 1:
            return ""
        return (
            f"predicted slower than the original on target {self.target!r} for a batch of {self.batch}, {self.speed_up:.3f}×: a larger batch, image or "
            f"model has more to win; latency_budget= keeps to what is predicted to pay, and flops_budget=1.0 to the exact passes"
        )

    @property
    def share_of_limit(self) -> float:
        """Of what the FLOPs alone would give."""
        return self.speed_up * self.flops_ratio

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {**asdict(self), "after": asdict(self.after), "flops_ratio": self.flops_ratio}
        return {**found, "speed_up": self.speed_up, "share_of_limit": self.share_of_limit}

    def __str__(self) -> str:
        rows = [_row(row) for row in self.blocks]
        total = ["", "together", "", "", "", *_costs(sum((r.before for r in self.blocks), Cost(0, 0.0)), self.after)]
        headers = ["block", "layer", "patches in", "leave", "out", "GFLOPs", "then", "ms", "then", "of limit"]
        table = tabulate([*rows, total], headers, disable_numparse=True, colalign=("right", "left", *("right",) * 8))
        rates = (
            f"measured {self.measured}" if self.measured else "from its table: `gtp-fx tune` measures it where it is"
        )
        return "\n".join(
            [
                f"{self.budget}: {self.original.flops / 1e9:.3f} GFLOPs per image, {self.after.flops / 1e9:.3f} then: "
                f"{self.flops_ratio:.4f}, a limit of {ratio(self.original.flops, self.after.flops):.3f}×",
                f"predicted for {self.batch} images, compiled: {self.original.seconds * 1e3:.4g} ms, "
                f"{self.after.seconds * 1e3:.4g} ms then: {self.speed_up:.3f}×, {self.share_of_limit:.1%} of the limit",
                f"target {self.target} ({rates}); strategy {self.strategy}",
                *([f"schedule: least damage expected by {self.damage_from}"] if self.damage_from else []),
                "",
                table,
                "the last block's row has the head in it; ms and GFLOPs are with the exact passes done",
                *([self.slower] if self.slower else []),
                *(["", "left as it was:", *(f"  - {refusal}" for refusal in self.refusals)] if self.refusals else []),
            ]
        )


def _row(row: BlockForecast) -> list[str]:
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
