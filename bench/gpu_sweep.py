"""Sweep of one block of the original over counts of tokens. Steps in its time are borders of tiles.

A target's tiles of products and of attention are fitted to it (`targets/`), since removing tokens within a tile saves
no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.gpu_contenders import ATTENTION
from bench.gpu_models import SUBJECTS
from bench.gpu_stock import stock_attention
from bench.gpu_turns import Turn
from gtp_fx.measure.timing import Run, clock_for, interleave

_CALLS = 5
TOKENS = {
    "B": (256, tuple(range(96, 257, 8))),
    "L": (64, tuple(range(320, 641, 32))),
    "T": (2, (12, 16, 20)),
}
"""Images and counts of tokens, by net."""


@dataclass(frozen=True)
class SweepRow:
    """Times of one net's block.

    net: a name in `SUBJECTS`.
    batch: images per call.
    heads: attention heads.
    channels: channels of the stream.
    tokens: counts of tokens.
    seconds: times of a call, one per count, of "block" (compiled for any count) and of attention alone, by kernel.
    """

    net: str
    batch: int
    heads: int
    channels: int
    tokens: tuple[int, ...]
    seconds: dict[str, list[float]]


@dataclass(frozen=True)
class Sweep:
    """A sweep that is compiled, but not timed yet.

    row: the row to fill.
    runs: callables by name and count of tokens.
    device: their device.
    """

    row: SweepRow
    runs: dict[tuple[str, int], Run]
    device: torch.device

    @torch.no_grad()
    def timed(self, rounds: int, turn: Turn) -> SweepRow:
        """Time all counts interleaved, so that a drifting clock makes no step, and return the row."""
        runs = {f"{name} {count}": _repeated(run) for (name, count), run in self.runs.items()}
        clock = clock_for(self.device)
        trial = interleave(runs, rounds=1, warmup=1, clock=clock)
        each = sum(trial.spread(name).median for name in runs)
        fitting = max(3, int(0.8 * turn.left / max(each, 1e-9)))
        timings = interleave(runs, rounds=min(rounds, fitting), warmup=0, clock=clock)
        for name in dict.fromkeys(name for name, _ in self.runs):
            medians = [timings.spread(f"{name} {count}").median / _CALLS for count in self.row.tokens]
            self.row.seconds[name] = medians
        return self.row


@torch.no_grad()
def prepare(net: str, device: torch.device, dtype: torch.dtype) -> Sweep:
    """Compile the middle block once for any count of tokens, and prepare torch's attention alone."""
    batch, counts = TOKENS[net]
    model: Any = SUBJECTS[net].build()
    block = model.blocks[len(model.blocks) // 2].to(device, dtype)
    channels, heads = block.norm1.normalized_shape[0], block.attn.num_heads
    compiled: Any = torch.compile(block)
    runs: dict[tuple[str, int], Run] = {}
    for count in counts:
        x = torch.randn(batch, count, channels, device=device).to(dtype)
        torch._dynamo.mark_dynamic(x, 1)
        runs["block", count] = partial(compiled, x)
        q, k, v = torch.randn(batch, count, 3, heads, channels // heads, device=device).to(dtype).permute(2, 0, 3, 1, 4)
        for kind in ATTENTION:
            runs[f"attention {kind}", count] = partial(stock_attention, kind, q, k, v)
    for run in runs.values():
        run()
    return Sweep(SweepRow(net, batch, heads, channels, counts, {}), runs, device)


def _repeated(run: Run) -> Run:
    def again() -> None:
        for _ in range(_CALLS):
            run()

    return again


def steps(tokens: Sequence[int], seconds: Sequence[float], above: float = 0.04) -> list[int]:
    """Return the counts where time steps: it grows by over `above` more than the tokens, relative to the last count."""
    pairs = zip(tokens, tokens[1:], seconds, seconds[1:], strict=False)
    return [after for before, after, low, high in pairs if high / low > (1 + above) * after / before]
