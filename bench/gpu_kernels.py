"""How fast are the kernels? Against the rate of a copy, and against the stock attention that doesn't score.

The contenders of a row run interleaved, some dozen times in a row each; what is told is the median over rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.ops import gtp_fx_kernels  # type: ignore[import-not-found]

from gtp_fx.site_probes import propagation, selection
from gtp_fx.timing import clock_for, interleave

_REPEATS = 20
"""Runs of a timing: a single one is as short as the launch of it."""
_COPIED = 2**28
"""Bytes: more than any cache."""


@dataclass(frozen=True)
class KernelRow:
    """seconds: of one run. against: what it is held against, "copy" or "stock attention"; share: of the copy's rate for that, of its
    time for this. aim: what share is wanted, at least or at most."""

    kernel: str
    case: str
    seconds: float
    against: str
    share: float
    aim: float

    @property
    def reached(self) -> bool:
        return self.share >= self.aim if self.against == "copy" else self.share <= self.aim


def time_kernels(device: torch.device, dtype: torch.dtype, rounds: int, small: bool = False) -> Iterator[KernelRow]:
    """Selection, propagation, and attention with scores. small: sizes for a dry run."""
    images, attention = (256, ((256, 12, 197, 64), (32, 16, 577, 64))) if not small else (2, ((1, 1, 20, 16),))
    copied = torch.empty((_COPIED if not small else 4096) // dtype.itemsize, dtype=dtype, device=device)
    into = torch.empty_like(copied)
    for tokens, channels in ((196, 384), (196, 768), (576, 1024)) if not small else ((20, 16),):
        leaving = tokens // 12
        x = torch.randn(images, tokens, channels, device=device).to(dtype)
        scores = torch.rand(16 * images, tokens, device=device)
        moved = dtype.itemsize * channels * images * (2 * tokens - leaving)
        ranked = scores.numel() * (4 + 4 + 2 * 8)  # read; the map, and both pairs of lists
        runs = {
            "copy": (lambda: into.copy_(copied), 2 * copied.nbytes),
            "select": (_bound(*selection(scores, leaving)), ranked),
            "propagate": (_bound(*propagation(x, leaving)), moved),
        }
        seconds = _seconds({name: run for name, (run, _) in runs.items()}, device, rounds)
        rate = runs["copy"][1] / seconds["copy"]
        for name, shape in (("select", scores.shape), ("propagate", x.shape)):
            share = runs[name][1] / seconds[name] / rate
            yield KernelRow(name, str(tuple(shape)), seconds[name], "copy", share, 0.70)
    for size in attention:
        count, heads, tokens, head = size
        q, k, v = torch.randn(count, tokens, 3, heads, head, device=device).to(dtype).permute(2, 0, 3, 1, 4)
        scales = torch.ones(count, tokens - 1, device=device)
        runs = {
            "stock attention": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            "attend": lambda q=q, k=k, v=v, s=scales: _attend(q, k, v, s, "none"),
            "attend with scores": lambda q=q, k=k, v=v, s=scales: _attend(q, k, v, s, "mixed-max"),
        }
        seconds = _seconds(runs, device, rounds)
        for name in ("attend", "attend with scores"):
            share = seconds[name] / seconds["stock attention"]
            yield KernelRow(name, str(size), seconds[name], "stock attention", share, 1.10)


def _attend(q: Any, k: Any, v: Any, scales: Any, score: str) -> Any:
    return gtp_fx_kernels.attend(q, k, v, None, scales, None, None, score, 1, 0, [])


def _seconds(runs: dict[str, Any], device: torch.device, rounds: int) -> dict[str, float]:
    """Of one run each, the median over rounds."""
    for run in runs.values():
        run()  # compiles
    repeated = {name: _repeated(run, device) for name, run in runs.items()}
    timings = interleave(repeated, rounds=rounds, clock=clock_for(device))
    return {name: timings.spread(name).median / _REPEATS for name in runs}


def _repeated(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`_REPEATS` runs; on a GPU recorded, so that what Python does between launches isn't timed."""

    def again() -> None:
        for _ in range(_REPEATS):
            run()

    if device.type != "cuda":
        return again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again()
    replay: Callable[[], object] = graph.replay
    return replay


def _bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)
