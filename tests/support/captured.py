"""Models built and captured once a process, for tests that need a graph and change neither.

Capturing is most of what `optimize` takes. The entry point itself is tested in model/ and test_refusals.py; tests that
need only the passes' result use these. Cases on one model share an `xdist_group`, so that one process has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.capture.signatures import CallSignature
from gtp_fx.model.pipeline import Exact, Optimised, run_exact_passes, run_passes
from gtp_fx.options.calibration import bound
from gtp_fx.options.options import Options
from gtp_fx.report.provenance import Provenance, provenance_runner


class Source(Protocol):
    """A row or a family: what it builds and what that is called with."""

    def model(self) -> nn.Module:
        """A new one with the same weights as ever."""
        ...

    def inputs(self) -> Any:
        """A batch of two."""
        ...


@cache
def shared_model(source: Source) -> nn.Module:
    """The source's model, in evaluation mode: not to be changed."""
    return source.model()


@cache
def captured(source: Source) -> fx.GraphModule:
    """The graph of the shared model, over its parameters: not to be changed."""
    return capture_module(shared_model(source), signature(source))


def signature(source: Source) -> CallSignature:
    """How the shared model is called."""
    return call_signature(shared_model(source), source.inputs())


def optimised(source: Source, **options: Any) -> Optimised:
    """What `optimize` makes of the shared model with these options."""
    asked = Options.of(**options)
    if asked.calibration is not None:
        asked = replace(asked, calibration=bound(asked.calibration, signature(source).canonical))
    return run_passes(captured(source), asked)


def exact(source: Source, **options: Any) -> Exact:
    """The shared model's graph after the exact passes, its blocks marked."""
    return run_exact_passes(captured(source), Options.of(**options))


def provenance(made: Optimised, *inputs: Any) -> tuple[Provenance, ...]:
    """What `OptimizedModel.provenance` says of a call."""
    return provenance_runner(made.graph_module, made.sites, torch.device("cpu"))(*inputs)


@dataclass(frozen=True)
class Built:
    """A source from a function that builds a model, and the shape of what the model takes."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self) -> nn.Module:
        return self.make()

    def inputs(self) -> Tensor:
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(0))
