"""Forecast of what a plan costs, block by block, before anything is compiled; `gtp-fx plan` prints it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gtp_fx.errors import Refusal
from gtp_fx.options.schedule import Schedule
from gtp_fx.report.text import described, listed, number, table, wrapped

_SAME = 0.0005
"""Speed-ups that differ less from 1 than this are printed as "the same"."""
_LITTLE = 1.05
"""A predicted speed-up below this one is hardly worth what it costs."""


@dataclass(frozen=True)
class Cost:
    """FLOPs and predicted time of some work.

    flops: per image.
    seconds: predicted time of one run of the batch.
    """

    flops: int
    seconds: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.seconds + other.seconds)


def ratio(part: float, whole: float) -> float:
    """Return part / whole, and 1 where `whole` is 0.

    A graph may do no work that is counted, such as a head that only takes the class token.
    """
    return part / whole if whole else 1.0


@dataclass(frozen=True)
class BlockForecast:
    """Costs from the start of one attention block to the start of the next.

    block: the block's number; -1 for what runs before the first block.
    layer: the layer that holds its attention.
    tokens_in: patch tokens that enter; per window where `windows` isn't 0.
    removed: patch tokens that the plan removes; per window where `windows` isn't 0.
    windows: windows per image where tokens only skip the block's branch; 0 where they are removed from the stream.
    before: cost with all tokens.
    after: cost with the plan.
    window_tokens: the tokens of a window where whole windows may rest, which `tokens_in` and `removed` count then.
    """

    block: int
    layer: str
    tokens_in: int
    removed: int
    windows: int
    before: Cost
    after: Cost
    window_tokens: int = 0


@dataclass(frozen=True)
class Forecast:
    """Predicted cost of a plan, as a whole and by block.

    budget: the budget that was given, in words.
    target: the target's name.
    measured: the machine that the target's curves were measured on; empty where they come from its table.
    batch: images in a run.
    strategy: the strategy as Python writes it, with its values.
    strategy_name: its name.
    damage_from: source of the expected damage that schedule="auto" minimised; empty where it had nothing to choose.
    schedule: patch tokens that each block removes, and the blocks' shapes.
    original: cost of the model as it was captured.
    blocks: costs by block, after the exact passes.
    refusals: what stays unchanged, and why.
    """

    budget: str
    target: str
    measured: str
    batch: int
    strategy: str
    strategy_name: str
    damage_from: str
    schedule: Schedule
    original: Cost
    blocks: tuple[BlockForecast, ...]
    refusals: tuple[Refusal, ...] = ()

    @property
    def after(self) -> Cost:
        """Total cost with the plan."""
        return sum((row.after for row in self.blocks), Cost(0, 0.0))

    def tokens_removed(self, block: int) -> int:
        """Return how many patch tokens have been removed by the later half (the MLP) of a block."""
        row = next(row for row in self.blocks if row.block == block)
        whole = self.schedule.tokens[block]
        return whole - (row.tokens_in - row.removed)

    @property
    def flops_ratio(self) -> float:
        """FLOPs with the plan, relative to the original's."""
        return ratio(self.after.flops, self.original.flops)

    @property
    def speed_up(self) -> float:
        """Predicted time of the original, relative to that with the plan."""
        return ratio(self.original.seconds, self.after.seconds)

    @property
    def takes_the_same(self) -> bool:
        """Whether the predicted times are equal, as far as they are printed."""
        return abs(self.speed_up - 1) < _SAME

    @property
    def gain(self) -> str:
        """The predicted speed-up in words."""
        return "the same time" if self.takes_the_same else f"{self.speed_up:.3f}×"

    @property
    def hint(self) -> str:
        """Warning where the plan is predicted to lose time, or to gain hardly any; empty where it isn't."""
        if self.takes_the_same:
            return (
                ""
                if self.schedule.removes_nothing
                else f"predicted to take the same time as the original on target {self.target!r} for a batch of "
                f"{self.batch}: a lower budget, a larger batch, image or model has more to gain, and flops_budget=1.0 "
                f"changes no number"
            )
        if self.speed_up >= _LITTLE or (self.speed_up >= 1 and self.schedule.removes_nothing):
            return ""
        if self.speed_up >= 1:
            return (
                f"predicted to gain only {self.speed_up - 1:.1%}: a lower budget, a larger batch, image or model has "
                f"more to gain, and flops_budget=1.0 changes no number"
            )
        return (
            f"predicted slower than the original on target {self.target!r} for a batch of {self.batch}, "
            f"{self.gain}: a larger batch, image or model has more to gain; latency_budget= removes tokens "
            f"only where that is predicted to save time, and flops_budget=1.0 runs the exact passes alone"
        )

    @property
    def share_of_limit(self) -> float:
        """Predicted speed-up, relative to the limit: what the saved FLOPs alone would give."""
        return self.speed_up * self.flops_ratio

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the derived figures as JSON-able values."""
        found = {**asdict(self), "after": asdict(self.after), "flops_ratio": self.flops_ratio}
        return {**found, "speed_up": self.speed_up, "share_of_limit": self.share_of_limit}

    def __str__(self) -> str:
        """Return the table that `gtp-fx plan` prints."""
        whole = sum((row.before for row in self.blocks), Cost(0, 0.0))
        rows = [*map(_row, self.blocks), ["", "together", "", "", *_costs(whole, self.after)]]
        headers = ["#", "layer", "patches\nin", "leave", "GFLOPs\nbefore", "after", "ms\nbefore", "after", "gain\nkept"]
        untuned = "rates of its table; `gtp-fx tune` on it measures them"
        rates = f"measured {self.measured}" if self.measured else untuned
        return "\n".join(
            [
                wrapped(
                    f"{self.budget}: {self.original.flops / 1e9:.3f} GFLOPs per image before, "
                    f"{self.after.flops / 1e9:.3f} after: {self.flops_ratio:.4f}"
                ),
                f"predicted for {self.batch} images, compiled: {number(self.original.seconds * 1e3)} ms before, "
                f"{number(self.after.seconds * 1e3)} ms after:",
                wrapped(f"  {self.gain}; {ratio(self.original.flops, self.after.flops):.3f}× if time fell as FLOPs do"),
                wrapped(f"target {self.target} ({rates})"),
                *described(self.strategy_name, self.strategy),
                *([wrapped(f"schedule: least damage expected by {self.damage_from}")] if self.damage_from else []),
                "",
                table(headers, rows, left=(1,), shortened=1),
                wrapped(
                    "before: with the exact passes done; the last block's row includes the head; gain kept: the row's "
                    "speed-up, as a share of what its saved FLOPs alone would give"
                ),
                *([wrapped(self.hint)] if self.hint else []),
                *listed("left as it was:", self.refusals),
            ]
        )


def _row(row: BlockForecast) -> list[str]:
    """Return a block's cells in the table."""
    if row.block < 0:
        return ["", row.layer, "", "", *_costs(row.before, row.after)]
    tokens = f"{row.windows}×{row.tokens_in}" if row.windows else str(row.tokens_in)
    tokens = f"{tokens} of {row.window_tokens}" if row.window_tokens else tokens
    return [str(row.block), row.layer, tokens, str(row.removed), *_costs(row.before, row.after)]


def _costs(before: Cost, after: Cost) -> list[str]:
    """Return GFLOPs before and after, milliseconds before and after, and the share of the gain that is kept.

    That is the speed-up relative to what the saved FLOPs alone would give. It is empty where no FLOPs are saved.
    """
    share = ""
    if after.flops < before.flops and after.seconds > 0:
        share = f"{before.seconds / after.seconds * after.flops / before.flops:.0%}"
    figures = (before.flops / 1e9, after.flops / 1e9)
    costs = [f"{value:.3f}" if value < 100 else number(value) for value in figures]
    return [*costs, number(before.seconds * 1e3), number(after.seconds * 1e3), share]
