"""Comparison of an original and an optimised model: agreement of their outputs, and speed-up.

There are four contenders: each model eager, and each compiled, both with the optimised model's Inductor options.
Speed-ups compare like with like: eager with eager and compiled with compiled.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtp_fx.capture.signatures import tensors_in
from gtp_fx.errors import CheckError
from gtp_fx.graph.verify import rounding_tolerance
from gtp_fx.measure.steadiness import Steadiness, interleave_watched
from gtp_fx.measure.timing import Run, Spread, Timings, model_clock
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.options.progress import Progress, Steps
from gtp_fx.report.text import number, table, wrapped

ORIGINAL_EAGER, OPTIMISED_EAGER = "original eager", "optimised eager"
ORIGINAL_COMPILED, OPTIMISED_COMPILED = "original compiled", "optimised compiled"
BASELINES = {OPTIMISED_EAGER: ORIGINAL_EAGER, OPTIMISED_COMPILED: ORIGINAL_COMPILED}

_WARMUP = 1
_EAGER_OF = {ORIGINAL_COMPILED: ORIGINAL_EAGER, OPTIMISED_COMPILED: OPTIMISED_EAGER}


@dataclass(frozen=True)
class Agreement:
    """Agreement of the optimised model's logits with the original's on some images. Agreement is not accuracy.

    images: number of images.
    top1: share of images with the same best class.
    cosine_least: least cosine similarity over the images, between the two models' logits.
    cosine_mean: mean cosine similarity over the images.
    """

    images: int
    top1: float
    cosine_least: float
    cosine_mean: float

    def __str__(self) -> str:
        return (
            f"output of the original's shape, finite; against the original on {self.images} views of the photograph: "
            f"same top-1 for {self.top1:.0%}, cosine of logits {self.cosine_mean:.4f} (least {self.cosine_least:.4f}); "
            f"agreement, not accuracy"
        )


@dataclass(frozen=True)
class Compilation:
    """First call of a compiled model.

    seconds: duration of the call, compiling included.
    error: largest relative error of an image's logits, |compiled - eager| / |eager|.
    """

    seconds: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """Agreement and times of an original and an optimised model.

    agreement: comparison of the eager models' outputs.
    compilations: first calls of the compiled contenders, by name.
    tolerance: largest permitted error of a compilation.
    timings: seconds per run of every contender.
    flops_ratio: FLOPs of the optimised model / the original's, from its report.
    batch: images per run.
    steadiness: how far the timings can be trusted.
    """

    agreement: Agreement
    compilations: Mapping[str, Compilation]
    tolerance: float
    timings: Timings
    flops_ratio: float
    batch: int
    steadiness: Steadiness

    @property
    def limit(self) -> float:
        """Return the speed-up if time were proportional to FLOPs."""
        return 1 / self.flops_ratio

    def speed_up(self, name: str) -> Spread:
        """Return the speed-up of an optimised contender over the original run the same way (eager or compiled)."""
        return self.timings.speed_up(name, BASELINES[name])

    def share_of_limit(self, name: str) -> float:
        """Return median speed-up / limit."""
        return self.speed_up(name).median / self.limit

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict; times are seconds per batch."""
        return {
            "agreement": asdict(self.agreement),
            "compilations": {name: asdict(done) for name, done in self.compilations.items()},
            "tolerance": self.tolerance,
            "batch": self.batch,
            "rounds": self.timings.rounds,
            "steadiness": asdict(self.steadiness),
            "seconds": self.timings.to_dict(),
            "speed_up": {name: asdict(self.speed_up(name)) for name in BASELINES},
            "flops_ratio": self.flops_ratio,
            "flops_limit": self.limit,
            "share_of_limit": {name: self.share_of_limit(name) for name in BASELINES},
        }

    def __str__(self) -> str:
        rows = [self._row(name) for name in (ORIGINAL_EAGER, OPTIMISED_EAGER, ORIGINAL_COMPILED, OPTIMISED_COMPILED)]
        headers = ["", "ms per\nbatch", "images/s", "speed-\nup", "quartiles", "of\nlimit", "first\ncall"]
        lines = [
            table(headers, rows),
            f"medians of {self.timings.rounds} interleaved rounds, batch {self.batch}; like against like;",
            f"limit: 1 / {self.flops_ratio:.4f} of the FLOPs = {self.limit:.3f}×",
        ]
        return "\n".join([*lines, wrapped(self.steadiness.warning)]).rstrip()

    def _row(self, name: str) -> list[str]:
        own = self.timings.spread(name)
        row = [name, number(own.median * 1e3), f"{self.batch / own.median:.1f}"]
        if name in BASELINES:
            gain = self.speed_up(name)
            row += [f"{gain.median:.3f}×", f"{gain.lower:.2f}–{gain.upper:.2f}", f"{self.share_of_limit(name):.0%}"]
        else:
            row += ["1", "", ""]
        return [*row, f"{self.compilations[name].seconds:.1f} s" if name in self.compilations else ""]


@torch.no_grad()
def agreement(original: nn.Module, optimised: OptimizedModel, images: Tensor) -> Agreement:
    """Compare both models, eager, on images [B, …].

    Raises CheckError where the outputs' shapes differ or an output is not finite.
    """
    theirs, ours = original(images), optimised.graph_module(images)
    if _shapes(theirs) != _shapes(ours):
        raise CheckError(f"the optimised model's output is {_shapes(ours)}, the original's {_shapes(theirs)}")
    for name, output in (("original", theirs), ("optimised model", ours)):
        if not all(bool(t.isfinite().all()) for t in tensors_in(output)):
            raise CheckError(f"the {name}'s output is not finite on the photograph; are these weights whole?")
    a, b = _logits(theirs), _logits(ours)
    cosine = F.cosine_similarity(a, b, dim=1)
    top1 = (a.argmax(1) == b.argmax(1)).double().mean()
    return Agreement(len(images), float(top1), float(cosine.min()), float(cosine.mean()))


@torch.no_grad()
def compare(
    original: nn.Module,
    optimised: OptimizedModel,
    images: Tensor,
    *,
    rounds: int,
    progress: Progress | None = None,
) -> Comparison:
    """Check and time the four contenders on images [B, …].

    original: in eval mode.
    optimised: in eval mode, made with compile=True.
    rounds: rounds of timing; each runs every contender once.
    progress: called at every step.

    Raises CheckError where an output is wrong, and OptionError for no rounds. Errors of the compiler are not caught.
    """
    # Reset once, so that earlier compilations in this process (dynamic shapes, recompile counts) have no effect. Don't
    # reset between contenders: that would discard the first one's code before it is timed.
    torch.compiler.reset()
    compiled_original: Any = torch.compile(original, options=optimised.inductor_options or None)
    contenders: dict[str, Run] = {
        ORIGINAL_EAGER: lambda: original(images),
        OPTIMISED_EAGER: lambda: optimised.graph_module(images),
        ORIGINAL_COMPILED: lambda: compiled_original(images),
        OPTIMISED_COMPILED: lambda: optimised(images),
    }
    total = 1 + len(_EAGER_OF) + len(contenders) * (_WARMUP + rounds)
    steps = Steps(total, progress)
    steps.begin("checking on the photograph")
    agreed = agreement(original, optimised, images)
    tolerance = rounding_tolerance(images.dtype)
    compilations = {}
    for name, eager in _EAGER_OF.items():
        steps.done()
        steps.begin(f"compiling ({name})")
        compilations[name] = compile_checked(name, contenders[name], contenders[eager](), tolerance, images.device)
    steps.done()
    steps.begin("timing")
    timings, steady = interleave_watched(
        contenders, images.device, rounds=rounds, warmup=_WARMUP, clock=model_clock(images.device), progress=steps.done
    )
    return Comparison(agreed, compilations, tolerance, timings, optimised.report.flops_ratio, len(images), steady)


def compile_checked(name: str, run: Run, expected: Any, tolerance: float, device: torch.device) -> Compilation:
    """Call `run` once, which compiles, and compare its output with the eager model's.

    expected: the eager model's output.
    tolerance: largest permitted relative error of an image's logits.

    Raises CheckError where the shapes or, beyond the tolerance, the logits differ.
    """
    start = time.perf_counter()
    output = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if _shapes(output) != _shapes(expected):
        raise CheckError(f"{name}: output {_shapes(output)}, eager {_shapes(expected)}")
    compiled, eager = _logits(output), _logits(expected)
    error = float(((compiled - eager).norm(dim=1) / eager.norm(dim=1)).max())
    if not error <= tolerance:  # NaN fails too
        raise CheckError(f"{name}: logits are {error:.2g} (relative) from the eager model's, more than {tolerance:.2g}")
    return Compilation(seconds, error)


def _shapes(output: Any) -> list[list[int]]:
    return [list(t.shape) for t in tensors_in(output)]


def _logits(output: Any) -> Tensor:
    """Return the output's first tensor, which holds the logits or features, as [B, everything else] in float64."""
    return tensors_in(output)[0].flatten(1).double()
