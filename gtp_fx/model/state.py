"""What an optimised model keeps beside its parameters."""

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
    """blocks_needed: as `run_passes` has it. first: what was made before all
    others, whose schedule and strategy those carry out. by_mode: by `training`; runners: by that and the device. methods: the original's, by name, one for
    each form of arguments."""

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
        assert self.first is not None, "set when the model is made"
        return self.first

    def forget(self) -> None:
        """All graphs, to be made anew when they are asked for."""
        self.by_mode.clear()
        self.runners.clear()
        self.methods.clear()


def settled(options: Options, made: Optimised) -> Options:
    """The schedule that was made, with its strategy, which calibration may have chosen; no budget."""
    return replace(
        options,
        flops_budget=None,
        latency_budget=None,
        calibration=None,
        schedule=made.schedule,
        strategy=made.strategy,
    )
