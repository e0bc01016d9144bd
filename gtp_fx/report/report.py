"""Report on what was done to a model: FLOPs, sites, passes, refusals. It prints as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gtp_fx.errors import Refusal
from gtp_fx.passes.runner import PassStep
from gtp_fx.plan.choose import Contender
from gtp_fx.report.forecast import Forecast, ratio
from gtp_fx.report.text import described, listed, number, table, wrapped


@dataclass(frozen=True)
class SiteRow:
    """One site.

    Where whole windows rest, `window_tokens` isn't 0, and what is counted are an image's windows.

    block: the block's number.
    layer: the layer that holds the block's attention.
    tokens_in: tokens before the site, prefix tokens included; per window where `windows` isn't 0.
    removed: tokens that the site removes, or that skip the branch; per window where `windows` isn't 0.
    tokens_out: tokens after the site, or through the branch; per window where `windows` isn't 0.
    windows: 0 where tokens are removed from the stream; else windows per image, in each of which tokens skip the
        block's branch and remain in the stream.
    window_tokens: the tokens of a window that rests as a whole; else 0.
    """

    block: int
    layer: str
    tokens_in: int
    removed: int
    tokens_out: int
    windows: int = 0
    window_tokens: int = 0


@dataclass(frozen=True)
class ReturnedRow:
    """One output that runs over tokens, with output="reduced".

    output: its place in what the model returns, "hidden_states[2]".
    tokens: tokens that it has, prefix and suffix tokens included.
    whole: tokens that the original's has.
    """

    output: str
    tokens: int
    whole: int

    def __str__(self) -> str:
        """Return the row as a line."""
        return f"{self.output}: {self.tokens} of {self.whole} tokens"


@dataclass(frozen=True)
class Report:
    """Everything that was done to a model. FLOPs are per image, 2 per multiply-add, as torch.utils.flop_counter counts.

    flops_before: FLOPs of the original.
    flops_after: FLOPs of the result.
    flops_budget: the FLOPs budget that was given, or None.
    strategy: the strategy as Python writes it, with its values.
    strategy_name: its name.
    target: the target's name.
    blocks: how many attention blocks the model has.
    passes: the passes that ran, in order.
    sites: the blocks at which tokens are removed or skip a branch.
    refusals: what stays unchanged, and why.
    token_inputs: arguments that are tokens, where no patches are made in the graph.
    recovered: readers for which removed tokens are put back.
    returned: outputs that run over tokens, and how many they have; empty unless output="reduced".
    damage_from: source of the expected damage that schedule="auto" minimised; empty where it had nothing to choose.
    latency_budget: the latency budget that was given, or None.
    seconds: predicted time of a run of `batch` images through the original and through the result; None without a
        latency budget.
    batch: images in a run.
    forecast: FLOPs and predicted time of every block, before and after.
    moved: how far the outputs moved on the calibration images (`gtp_fx.plan.damage.divergence`); None where that
        wasn't measured.
    strategy_from: what strategy="auto" chose the strategy by; empty where it was given.
    contenders: what it was chosen from, the best first, and what was left out; empty where there was nothing to choose
        by.
    not_kept: what the original's forward leaves on its layers and never reads (a map kept for inspection, a counter);
        the result doesn't leave it. Attributes by path.
    made_for: the one call that the graph is for, where the original's forward reads the integers in it; else empty.
    """

    flops_before: int
    flops_after: int
    flops_budget: float | None
    strategy: str
    strategy_name: str
    target: str
    blocks: int
    passes: tuple[PassStep, ...]
    sites: tuple[SiteRow, ...]
    refusals: tuple[Refusal, ...]
    recovered: tuple[str, ...] = ()
    token_inputs: tuple[str, ...] = ()
    damage_from: str = ""
    latency_budget: str | None = None
    seconds: tuple[float, float] | None = None
    batch: int = 0
    forecast: Forecast | None = None
    moved: float | None = None
    not_kept: tuple[str, ...] = ()
    strategy_from: str = ""
    contenders: tuple[Contender, ...] = ()
    returned: tuple[ReturnedRow, ...] = ()
    made_for: str = ""

    @property
    def flops_ratio(self) -> float:
        """FLOPs of the result, relative to the original's."""
        return self._ratio(self.flops_after)

    def _ratio(self, flops: int) -> float:
        """Return FLOPs relative to the original's."""
        return ratio(flops, self.flops_before)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the FLOPs ratio as JSON-able values."""
        return {**asdict(self), "flops_ratio": self.flops_ratio}

    def plot(self, file: str | Path) -> None:
        """Plot tokens and predicted time of every block, before and after. The file's suffix gives its format.

        Raises OptionError where matplotlib isn't installed or can't write that format.
        """
        from gtp_fx.report.plots import plot_blocks

        assert self.forecast is not None, "the pipeline gives every report one"
        plot_blocks(self.forecast, Path(file))

    def _placements(self) -> str:
        """Say at how many blocks tokens are removed, at how many they skip a branch, and at how many windows rest."""
        skipping = sum(bool(site.windows) for site in self.sites)
        resting = sum(bool(site.window_tokens) for site in self.sites)
        removing = len(self.sites) - skipping - resting
        parts = [f"tokens are removed at {removing}"] if removing or not self.sites else []
        if skipping:
            parts.append(f"{'' if parts else 'tokens '}skip a branch at {skipping}")
        if resting:
            parts.append(f"windows rest at {resting}")
        return " and ".join(parts)

    def __str__(self) -> str:
        """Return the report as text: a summary, tables of passes and sites, then what was put back or refused."""
        budget = f" (budget {self.flops_budget:g})" if self.flops_budget is not None else ""
        lines = [
            wrapped(
                f"{self.flops_before / 1e9:.3f} GFLOPs per image before, {self.flops_after / 1e9:.3f} after: "
                f"{self.flops_ratio:.4f} of the original's{budget}"
            ),
            wrapped(f"target {self.target}; {self._placements()} of {self.blocks} attention blocks"),
            *described(self.strategy_name, self.strategy),
        ]
        if self.strategy_from:
            lines.append(wrapped(f'strategy="auto": {self.strategy_from}'))
        if self.seconds is not None:
            before, after = (seconds * 1e3 for seconds in self.seconds)
            lines.append(
                f"predicted for {self.batch} images, compiled: {number(before)} ms before, "
                f"{number(after)} ms after,\n  {ratio(after, before):.4f} of it (budget {self.latency_budget})"
            )
        if self.forecast is not None and self.forecast.hint:
            lines.append(wrapped(self.forecast.hint))
        if self.damage_from:
            lines.append(wrapped(f"schedule: least damage expected by {self.damage_from}"))
        lines += ["", *self._passes()]
        if self.sites:
            branches = any(s.windows or s.window_tokens for s in self.sites)
            rows = [
                [s.block, s.layer, s.tokens_in, s.removed, s.tokens_out, *([_where(s)] if branches else [])]
                for s in self.sites
            ]
            headers = ["block", "layer", "tokens\nin", "leave", "out", *(["where"] if branches else [])]
            lines += ["", table(headers, rows, left=(1, 5), shortened=1)]
        if self.contenders:
            lines += ["", *_contest(self.contenders)]
        lines += listed(
            "for these integers and sizes alone, which forward reads:", [self.made_for] * bool(self.made_for)
        )
        lines += listed("tokens come in as arguments:", self.token_inputs)
        lines += listed("returned with the tokens left:", self.returned)
        lines += listed("tokens put back for:", self.recovered)
        lines += listed("left as it was:", self.refusals)
        lines += listed("no longer kept by forward, which never reads it:", self.not_kept)
        return "\n".join(lines)

    def _passes(self) -> list[str]:
        """Return the table of the passes that changed FLOPs or the number of operators, and how many others ran."""
        sizes = [(step.flops, step.operators) for step in self.passes]
        shown = [
            [s.name, s.tier, f"{s.flops / 1e9:.3f}", f"{self._ratio(s.flops):.4f}", s.operators]
            for i, s in enumerate(self.passes)
            if i == 0 or sizes[i] != sizes[i - 1]
        ]
        others = len(self.passes) - len(shown)
        lines = [table(["pass", "tier", "GFLOPs after", "ratio", "operators"], shown, left=(0, 1))]
        if others:
            lines.append(f"passes that changed neither FLOPs nor the number of operators: {others}")
        return lines


def _where(site: SiteRow) -> str:
    """Say whether a site works on the stream, on a branch or on whole windows."""
    if site.window_tokens:
        return f"windows of {site.window_tokens} tokens"
    return f"branch, {site.windows} windows" if site.windows else "stream"


def _contest(contenders: tuple[Contender, ...]) -> list[str]:
    """Return the lines on what strategy="auto" chose from: the best contender of each strategy, or why it has none."""
    judged = {row.name: row for row in reversed(contenders) if row.moved is not None}
    best = sorted(judged.values(), key=contenders.index)
    rows = [[row.name, f"{row.moved:.4g}", row.images, row.schedule] for row in best]
    refused = {row.name: row.refused for row in contenders if row.name not in judged}
    return [
        table(["the best of\neach strategy", "diver-\ngence", "images", "schedule"], rows, left=(0, 3)),
        *(wrapped(f"left out: {name}: {why}") for name, why in refused.items()),
    ]
