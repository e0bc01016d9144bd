"""Speed-up of whole models on this GPU, against the same model compiled as well as torch can.

Contenders are interleaved in one run and timed with CUDA events. The result is the fastest optimised contender against
the fastest original. A row says which originals ran, and claims a best one only where all of them did.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import gtp_fx
from bench.gpu_contenders import AT_BORDER, BASELINES, VARIANTS, Compiled, Contender, compiled
from bench.gpu_profile import Profile, profiled
from bench.gpu_turns import Turn
from bench.live_weights import enliven
from gtp_fx.graph.verify import rounding_tolerance
from gtp_fx.measure.timing import Run, Timings, clock_for, interleave
from gtp_fx.targets import Target

_CHECKED = 4
"""Images per batch whose outputs are compared."""
_CALLS, _LARGE = 5, 8
"""Calls per timing, and the least batch for it. The host's work before the first call is then a small part of the time.
Below that batch, a timing is a single call."""
_WARM_UP = 3
ORIGINAL, OURS = "original", "ours"


@dataclass(frozen=True)
class Subject:
    """A model to time.

    name: timm's name.
    side: side of its images, in pixels.
    border: (block, count) of a schedule with one site and about the same FLOPs, which keeps as many tokens as fill
        whole tiles of attention.
    made_with: arguments of `timm.create_model`.
    budget: FLOPs budget, as a share of the original's.
    """

    name: str
    side: int
    border: tuple[int, int]
    made_with: Mapping[str, Any] = field(default_factory=dict)
    budget: float = 0.74

    def build(self) -> nn.Module:
        """Return the model in eval mode, with random weights."""
        made: nn.Module = timm.create_model(self.name, **self.made_with)
        return enliven(made).eval()


SUBJECTS = {
    "S": Subject("deit_small_patch16_224", 224, (4, 69)),
    "B": Subject("deit_base_patch16_224", 224, (4, 69)),
    "L": Subject("vit_large_patch16_384", 384, (7, 193)),
    "D": Subject("vit_base_patch14_dinov2", 518, (3, 375)),
    "T": Subject("deit_tiny_patch16_224", 64, (0, 5), {"img_size": 64, "depth": 2}, 0.6),
}


@dataclass(frozen=True)
class Entry:
    """One contender.

    flops_ratio: its FLOPs / the original's.
    error: relative error of its outputs, against the same graph run eagerly.
    first: seconds of the first call.
    attention: attention calls in the generated code, by kernel.
    rounds: seconds per call, by round.
    failed: error message where it raised, else "".
    """

    flops_ratio: float = 1.0
    error: float = float("nan")
    first: float = 0.0
    attention: Mapping[str, int] = field(default_factory=dict)
    rounds: tuple[float, ...] = ()
    failed: str = ""


@dataclass(frozen=True)
class ModelRow:
    """One net at one batch.

    net: a name in `SUBJECTS`.
    model: timm's name.
    side: side of its images, in pixels.
    batch: images per run.
    dtype: dtype of parameters and images.
    target: name of the target.
    flops_ratio: FLOPs of the optimised model / the original's.
    schedule: removed tokens at each attention block.
    predicted: speed-up predicted by the target's cost model.
    contenders: entries by name.
    fastest: name of the fastest contender by kind, `ORIGINAL` and `OURS`.
    speed_up: lower quartile, median and upper quartile over rounds of the fastest ones' speed-up; None without both.
    not_run: names of the originals in `BASELINES` that didn't run.
    profile: time by operator of the fastest contenders, by kind.
    calls: calls per timing.
    weights: what the weights are.
    """

    net: str
    model: str
    side: int
    batch: int
    dtype: str
    target: str
    flops_ratio: float
    schedule: tuple[int, ...]
    predicted: float
    contenders: Mapping[str, Entry]
    fastest: Mapping[str, str] = field(default_factory=dict)
    speed_up: tuple[float, float, float] | None = None
    not_run: tuple[str, ...] = ()
    profile: Mapping[str, Profile] = field(default_factory=dict)
    calls: int = 1
    weights: str = "random, spread out"

    @property
    def wrong(self) -> list[str]:
        """Return the contenders whose outputs are further from eager's than rounding explains."""
        limit = rounding_tolerance(getattr(torch, self.dtype))
        return [name for name, entry in self.contenders.items() if not entry.failed and not entry.error <= limit]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "wrong": self.wrong}


@dataclass
class Prepared:
    """A row whose contenders are compiled, but not timed yet.

    row: the row so far.
    images: the batch.
    runs: working contenders by name.
    entries: entries by name, without times.
    """

    row: ModelRow
    images: torch.Tensor
    runs: dict[str, Run]
    entries: dict[str, Entry]


@torch.no_grad()
def prepare(
    net: str, batch: int, contenders: Sequence[Contender], target: Target, dtype: torch.dtype, code: Path
) -> Prepared:
    """Compile each contender and compare its outputs with the same graph's, run eagerly.

    code: folder for the code that Inductor generates.
    """
    subject, device = SUBJECTS[net], torch.device(target.device)
    model = subject.build().to(device, dtype)
    images = torch.randn(batch, 3, subject.side, subject.side, generator=torch.Generator().manual_seed(0))
    images = images.to(device, dtype)
    few = images[:_CHECKED]
    told = {"target": target, "example_inputs": few, "compile": False}
    # GTP as published: the strategy that has kernels.
    plain = gtp_fx.optimize(model, flops_budget=subject.budget, batch=batch, strategy="gtp", **told)  # type: ignore[arg-type]
    schedule = tuple(plain.schedule)
    eager: dict[str, nn.Module] = {ORIGINAL: model, "": plain}
    runs, entries = {}, {}
    for contender in contenders:
        options = _options(contender.variant, subject, schedule)
        kind = contender.variant if contender.ours else ORIGINAL
        try:
            if kind not in eager:
                approximate = {name: options[name] for name in ("schedule", "strategy") if name in options}
                eager[kind] = gtp_fx.optimize(model, **approximate, **told)  # type: ignore[arg-type]
            made = compiled(contender, model, images, options, target)
            entry = _first_run(made, eager[kind](few))
            if contender.ours:
                entry = replace(entry, flops_ratio=eager[kind].report.flops_ratio)  # type: ignore[union-attr, arg-type]
            entries[str(contender)] = entry
        except Exception as error:  # of one contender; the others go on
            entries[str(contender)] = Entry(failed=f"{type(error).__name__}: {str(error).strip()[:300]}")
            continue
        runs[str(contender)] = made.run
        code.mkdir(parents=True, exist_ok=True)
        (code / f"{str(contender).replace(', ', '-')}.py").write_text("\n\n".join(made.code))
    forecast = plain.report.forecast
    assert forecast is not None
    has_original = any(not contender.ours for contender in contenders)
    row = ModelRow(
        net=net,
        model=subject.name,
        side=subject.side,
        batch=batch,
        dtype=str(dtype).removeprefix("torch."),
        target=target.name,
        flops_ratio=plain.report.flops_ratio,
        schedule=schedule,
        predicted=forecast.speed_up,
        contenders=entries,
        not_run=tuple(str(one) for one in BASELINES if str(one) not in runs) if has_original else (),
        calls=_CALLS if batch >= _LARGE else 1,
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # other stages prepare on the same GPU
    return Prepared(row, images, runs, entries)


def _options(variant: str, subject: Subject, schedule: Sequence[int]) -> dict[str, Any]:
    """Return the backend's options of a variant. The schedule is fixed, so that a variant differs in one thing only.

    What has no variant is GTP as published, the strategy that has kernels.
    """
    block, removed = subject.border
    border = [removed if place == block else 0 for place in range(len(schedule))]
    chosen = border if variant in AT_BORDER else list(schedule)
    return {"schedule": chosen, "strategy": "gtp", **VARIANTS.get(variant, {})}


def _first_run(made: Compiled, wanted: torch.Tensor) -> Entry:
    """Compile a contender and compare its output. It runs three times, so that CUDA graphs are recorded too."""
    begun = time.perf_counter()
    found = made.run()
    error = _error(found, wanted)  # waits for the GPU
    first = time.perf_counter() - begun
    del found
    for _ in range(2):
        made.run()
    return Entry(error=error, first=first, attention=made.attention)


def _error(found: Any, wanted: torch.Tensor) -> float:
    """Return the largest relative error of an image, |found - wanted| / |wanted|."""
    one, other = (x[:_CHECKED].flatten(1).double() for x in (found, wanted))
    return float(((one - other).norm(dim=1) / other.norm(dim=1)).max())


@torch.no_grad()
def timed(prepared: Prepared, rounds: int, turn: Turn) -> ModelRow:
    """Time the contenders that didn't fail, over `rounds` rounds or as many as fit into the turn."""
    row, runs = prepared.row, prepared.runs
    if not runs:
        return row
    device = prepared.images.device
    calls = {name: _repeated(run, row.calls) for name, run in runs.items()}
    clock = clock_for(device)
    trial = interleave(calls, rounds=1, warmup=_WARM_UP, clock=clock)
    each = sum(trial.spread(name).median for name in runs)
    fitting = max(3, int(0.6 * turn.left / max(each, 1e-9)))
    timings = interleave(calls, rounds=min(rounds, fitting), warmup=0, clock=clock)
    seconds = {name: tuple(value / row.calls for value in timings.seconds[name]) for name in runs}
    entries = {name: replace(entry, rounds=seconds.get(name, ())) for name, entry in prepared.entries.items()}
    fastest = {kind: name for kind in (ORIGINAL, OURS) if (name := _fastest(timings, kind))}
    row = replace(row, contenders=entries, fastest=fastest)
    if len(fastest) < 2:
        return row
    gain = timings.speed_up(fastest[OURS], fastest[ORIGINAL])
    return replace(row, speed_up=(gain.lower, gain.median, gain.upper))


@torch.no_grad()
def by_operator(prepared: Prepared, row: ModelRow, traces: Path) -> ModelRow:
    """Return the row with profiles of the fastest original and the fastest optimised contender.

    traces: folder for the timelines.
    """
    device = prepared.images.device
    profile = {
        kind: profiled(prepared.runs[name], _CALLS, device, traces / f"{row.net}-{row.batch}-{kind}.json.gz")
        for kind, name in row.fastest.items()
    }
    return replace(row, profile=profile)


def _repeated(run: Run, times: int) -> Run:
    def again() -> None:
        for _ in range(times):
            run()

    return again


def _fastest(timings: Timings, kind: str) -> str | None:
    own = [name for name in timings.seconds if name.split(", ")[0] == kind]
    return min(own, key=lambda name: timings.spread(name).median, default=None)
