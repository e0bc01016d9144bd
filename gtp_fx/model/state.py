"""State of an optimised model, beside its parameters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from gtp_fx.capture.signatures import CallSignature
from gtp_fx.capture.turns import Modules
from gtp_fx.model.forms import Forms
from gtp_fx.model.modes import Part
from gtp_fx.model.pipeline import Optimised
from gtp_fx.model.watch import Watch
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import Schedule
from gtp_fx.report.report import Report
from gtp_fx.strategies import Strategy


@dataclass(frozen=True)
class Chosen:
    """What was decided when a model was made, which all of its graphs carry out.

    schedule: tokens that each block removes.
    strategy: how.
    report: what was done.
    """

    schedule: Schedule
    strategy: Strategy
    report: Report


@dataclass(frozen=True)
class Made:
    """One graph of a model, before and after it was rewritten.

    captured: the graph as it was captured; it is rewritten anew where somebody reads a layer that was joined.
    optimised: the rewritten graph.
    """

    captured: fx.GraphModule
    optimised: Optimised


@dataclass(frozen=True)
class Runner:
    """What runs one graph on one device.

    run: the graph module, or its compiled form.
    graph_module: the graph module.
    top: names of the parameters that it reads from the model itself, and not from its modules.
    watch: what the graph takes for granted of the model.
    casts: autocast states that the graph was captured in.
    """

    run: Any
    graph_module: fx.GraphModule
    top: tuple[str, ...]
    watch: Watch
    casts: Any = ()


Mode = tuple[bool, "torch.dtype | None", tuple[str, ...]]
"""What a graph is captured for: `training`, the weights' dtype, which is written into it (`x.to(float32)`), and the
paths of parts that are in the other mode."""


@dataclass
class State:
    """State of one `OptimizedModel`.

    original: the model it was made from.
    signature: how it is called, with examples.
    dtype: of the weights when the examples were given.
    options: the options it was made with.
    compile: whether Inductor compiles its graphs.
    recapture: whether a change of the model that its graph can't follow makes a new graph, and is no error.
    blocks_needed: whether a graph without attention over patches is refused.
    taps: paths of modules whose outputs the graphs return, too.
    chosen: schedule, strategy and report, once the first graph is made.
    own_calls: paths of layers that no pass may join with others, since somebody reads or replaces what they do.
    modules: identities of the original's modules, by which threads take turns.
    parts: the modules inside whose forward may depend on their mode.
    graphs: the graphs, by mode.
    runners: what runs them, by mode, device, and whether they also return which tokens were kept.
    methods: optimised methods of the original, by name.
    any_size: whether a call of another image size makes a form for it.
    forms: the optimised models of other forms of call, over the same original.
    """

    original: nn.Module
    signature: CallSignature
    dtype: torch.dtype | None
    options: Options
    compile: bool
    recapture: bool = False
    blocks_needed: bool = True
    taps: tuple[str, ...] = ()
    chosen: Chosen | None = None
    own_calls: frozenset[str] = frozenset()
    modules: Modules = frozenset()
    parts: tuple[Part, ...] = ()
    graphs: dict[Mode, Made] = field(default_factory=dict)
    runners: dict[tuple[Mode, torch.device, bool], Runner] = field(default_factory=dict)
    methods: dict[str, Forms] = field(default_factory=dict)
    any_size: bool = False
    forms: Forms = field(default_factory=Forms)

    @property
    def settled(self) -> Chosen:
        """What was decided when the model was made."""
        assert self.chosen is not None, "set when the model is made"
        return self.chosen

    @property
    def compiles(self) -> bool:
        """Whether Inductor compiles the graphs: not those of a method without attention, which has nothing to gain."""
        return self.compile and (self.blocks_needed or self.settled.report.blocks > 0)

    @property
    def of_each_form(self) -> list[State]:
        """This state, and that of each other form of call."""
        return [self, *(model._gtp for model in self.forms)]

    def forget(self) -> None:
        """Discard all graphs, also the other forms'; they are made anew when they are needed."""
        for state in self.of_each_form:
            state.graphs.clear()
            state.runners.clear()
            state.methods.clear()


def settled(options: Options, chosen: Chosen) -> Options:
    """Return options that reproduce a schedule and strategy, without budgets or calibration."""
    return replace(
        options,
        flops_budget=None,
        latency_budget=None,
        calibration=None,
        schedule=chosen.schedule,
        strategy=chosen.strategy,
    )
