"""What was done to a model: FLOPs, sites, passes, refusals. Printing it gives tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from gtp_fx.errors import Refusal
from gtp_fx.passes.runner import PassStep
from gtp_fx.report.forecast import Forecast, ratio


@dataclass(frozen=True)
class SiteRow:
    """One site: block number, layer, tokens (prefix included) before and after, how many were propagated.

    windows: 0 where they leave the stream; else they only skip the block's branch, so many in each of so many windows of an
    image.
    """

    block: int
    layer: str
    tokens_in: int
    propagated: int
    tokens_out: int
    windows: int = 0


@dataclass(frozen=True)
class Report:
    """FLOPs are per image, 2 per multiply-add, as torch.utils.flop_counter counts them.

    flops_budget: what was asked, or None. refusals: what was left as it was, and why.
    recovered: readers for which tokens that had left were put back.
    damage_from: where the expected damage comes from that schedule="auto" minimised; empty where nothing was chosen.
    latency_budget: what was asked, or None. seconds: predicted, of a run of `batch` images through the original and the result.
    forecast: FLOPs and predicted time of every block, before and after, as `gtp-fx plan` prints them.
    moved: how far outputs moved on calibration's images, as `gtp_fx.plan.damage.divergence` has it; None where nobody looked.
    """

    flops_before: int
    flops_after: int
    flops_budget: float | None
    strategy: str
    target: str
    blocks: int
    passes: tuple[PassStep, ...]
    sites: tuple[SiteRow, ...]
    refusals: tuple[Refusal, ...]
    recovered: tuple[str, ...] = ()
    damage_from: str = ""
    latency_budget: str | None = None
    seconds: tuple[float, float] | None = None
    batch: int = 0
    forecast: Forecast | None = None
    moved: float | None = None

    @property
    def flops_ratio(self) -> float:
        return self._ratio(self.flops_after)

    def _ratio(self, flops: int) -> float:
        return ratio(flops, self.flops_before)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "flops_ratio": self.flops_ratio}

    def plot(self, file: str | Path) -> None:
        """Draw tokens and predicted time of every block, before and after, to a PNG (or whatever matplotlib writes by that suffix).

        Raises OptionError where matplotlib isn't installed or doesn't write such files.
        """
        from gtp_fx.report.plots import plot_blocks

        assert self.forecast is not None, "the pipeline gives every report one"
        plot_blocks(self.forecast, Path(file))

    def _placements(self) -> str:
        skipping = sum(bool(site.windows) for site in self.sites)
        leaving = f"tokens leave at {len(self.sites) - skipping}"
        if not skipping:
            return leaving
        return (
            f"{leaving} and skip a branch at {skipping}"
            if skipping < len(self.sites)
            else f"tokens skip a branch at {skipping}"
        )

    def __str__(self) -> str:
        asked = f" (budget {self.flops_budget:g})" if self.flops_budget is not None else ""
        lines = [
            f"{self.flops_before / 1e9:.3f} GFLOPs per image before, {self.flops_after / 1e9:.3f} after: "
            f"{self.flops_ratio:.4f} of the original's{asked}",
            f"strategy {self.strategy}; target {self.target}; {self._placements()} of {self.blocks} attention blocks",
        ]
        if self.seconds is not None:
            before, after = (seconds * 1e3 for seconds in self.seconds)
            lines.append(
                f"predicted for {self.batch} images, compiled: {before:.3g} ms before, {after:.3g} ms after, {ratio(after, before):.4f} of it "
                f"(budget {self.latency_budget})"
            )
        if self.forecast is not None and self.forecast.slower:
            lines.append(self.forecast.slower)
        if self.damage_from:
            lines.append(f"schedule: least damage expected by {self.damage_from}")
        steps = [
            [s.name, s.tier, f"{s.flops / 1e9:.3f}", f"{self._ratio(s.flops):.4f}", s.operators] for s in self.passes
        ]
        headers = ["pass", "tier", "GFLOPs after", "ratio", "operators"]
        lines += ["", tabulate(steps, headers, disable_numparse=True, colalign=("left",) * 2 + ("right",) * 3)]
        if self.sites:
            branches = any(s.windows for s in self.sites)
            rows = [
                [s.block, s.layer, s.tokens_in, s.propagated, s.tokens_out, *([_where(s)] if branches else [])]
                for s in self.sites
            ]
            headers = ["block", "layer", "tokens in", "propagated", "tokens out", *(["where"] if branches else [])]
            lines += ["", tabulate(rows, headers)]
        if self.recovered:
            lines += ["", "tokens put back for:", *(f"  - {reader}" for reader in self.recovered)]
        if self.refusals:
            lines += ["", "left as it was:", *(f"  - {refusal}" for refusal in self.refusals)]
        return "\n".join(lines)


def _where(site: SiteRow) -> str:
    return f"branch, in each of {site.windows} windows" if site.windows else "stream"
