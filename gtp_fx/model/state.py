"""State of an optimised model, beside its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from gtp_fx.capture.inputs import CallSignature
from gtp_fx.model.parameters import ModuleMap
from gtp_fx.model.pipeline import Optimised
from gtp_fx.options.options import Options


@dataclass
class State:
    """State of one `OptimizedModel`.

    original: the model it was made from.
    signature: how it is called, with examples.
    options: the options it was made with.
    compile: whether Inductor compiles its graphs.
    blocks_needed: whether a graph without attention over patches is refused.
    twins: from each module of the original to the one that replaces it.
    first: the first optimised graph. Later ones (training mode, other dtypes) reuse its schedule and strategy.
    by_mode: the optimised graphs, by `training`.
    runners: what runs them, compiled or not, by `training` and device.
    methods: optimised methods of the original, by name, one for each form of arguments.
    """

    original: nn.Module
    signature: CallSignature
    options: Options
    compile: bool
    blocks_needed: bool
    twins: ModuleMap
    first: Optimised | None = None
    by_mode: dict[bool, Optimised] = field(default_factory=dict)
    runners: dict[tuple[bool, torch.device], Any] = field(default_factory=dict)
    methods: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def chosen(self) -> Optimised:
        """The first optimised graph, whose schedule and strategy all others have."""
        assert self.first is not None, "set when the model is made"
        return self.first

    def forget(self) -> None:
        """Discard all graphs; they are made anew when they are needed."""
        self.by_mode.clear()
        self.runners.clear()
        self.methods.clear()


def settled(options: Options, made: Optimised) -> Options:
    """Return options that reproduce `made`: its schedule and strategy, without budgets or calibration."""
    return replace(
        options,
        flops_budget=None,
        latency_budget=None,
        calibration=None,
        schedule=made.schedule,
        strategy=made.strategy,
    )
