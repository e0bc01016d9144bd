"""What `optimize` returns: an nn.Module that stands in for the original.

Same call, same output type and shapes, same parameters (names, order, storage), any batch, both modes, `.to()`,
`state_dict()`, and the original's plain attributes (`config`, `pretrained_cfg`, …). What would run the *original's* code, its
methods, is refused instead of silently being slow.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from gtp_fx.capture import capture_module
from gtp_fx.config import Options
from gtp_fx.damage.calibration import Calibration, bound
from gtp_fx.inputs import CallSignature
from gtp_fx.lowering import lowered
from gtp_fx.pipeline import Optimised, run_passes
from gtp_fx.provenance import Provenance, SiteRecord, provenance_runner
from gtp_fx.report import Report
from gtp_fx.schedule import Schedule
from gtp_fx.strategies import Strategy
from gtp_fx.thresholds import Thresholds, mean_thresholds


class OptimizedModel(nn.Module):
    """An optimised vision transformer.

    graph_module: the rewritten graph, in `gtp_fx` and ATen operators. report: what was done. schedule, strategy: tokens that leave
    per block, and how. With `compile`, Inductor compiles the graph at the first call.
    """

    def __init__(self, original: nn.Module, signature: CallSignature, options: Options, compile: bool) -> None:
        super().__init__()
        tree = _parameter_tree(original, {})
        # The graphs and this module hold the very same dicts, so `.to()` and `load_state_dict` reach all of them.
        self._parameters, self._buffers, self._modules = tree._parameters, tree._buffers, tree._modules
        self._non_persistent_buffers_set = tree._non_persistent_buffers_set
        # Set past nn.Module, which would register the original as a child and double every name.
        self._gtp: _State
        object.__setattr__(self, "_gtp", _State(original, signature, options, compile))
        self._specialise(training=False)
        self.training = original.training

    @property
    def graph_module(self) -> fx.GraphModule:
        return self._gtp.evaluation.graph_module

    @property
    def report(self) -> Report:
        return self._gtp.evaluation.report

    @property
    def schedule(self) -> Schedule:
        return self._gtp.evaluation.schedule

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """What each site does to its stream, by the graph's numbers of calls; none where tokens only skip branches."""
        return self._gtp.evaluation.sites

    @property
    def strategy(self) -> Strategy:
        """The one that was asked for, or what calibration made of it."""
        return self._gtp.evaluation.strategy

    @property
    def signature(self) -> CallSignature:
        """How it is called, with examples of two images."""
        return self._gtp.signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self._gtp.signature.canonical(args, kwargs)
        return self._runner()(*args, **kwargs)

    def provenance(self, *args: Any, **kwargs: Any) -> tuple[Provenance, ...]:
        """Called as the model is: for each stream of tokens, which patches each token left stands for, and by how much.

        Empty where no token leaves. Eager, in the evaluation graph.
        """
        args, kwargs = self._gtp.signature.canonical(args, kwargs)
        evaluation = self._gtp.evaluation
        return provenance_runner(evaluation.graph_module, evaluation.sites, self._device())(*args, **kwargs)

    def attention_thresholds(self, images: Any) -> Thresholds:
        """Of a model that was optimised with theta below 1: its smallest attention that stays, by block and head, for `GTP(thresholds=…)`.

            exact = gtp_fx.optimize(model, flops_budget=0.74, strategy=gtp_fx.GTP(attention_sparsity=0.8))
            strategy = gtp_fx.GTP(attention_sparsity=0.8, thresholds=exact.attention_thresholds(images))
            fast = gtp_fx.optimize(model, schedule=exact.schedule, strategy=strategy)

        images: as `calibration=` takes them, unlabelled; the mean over them. Eager. Raises OptionError where theta is 1.
        """
        calls = bound(Calibration.of(images), self._gtp.signature.canonical).images
        return mean_thresholds(self.graph_module, calls)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_gtp" or name.startswith("__"):
                raise
        value = getattr(self._gtp.original, name)  # raises the usual error where there is none
        if callable(value):
            raise AttributeError(
                f"{type(self._gtp.original).__name__}.{name} would run the original model, not the optimised graph; call the "
                f"optimised model itself, or gtp_fx.optimize a module whose forward is {name}"
            )
        return value

    def extra_repr(self) -> str:
        return f"{type(self._gtp.original).__name__} at {self.report.flops_ratio:.4f} of its FLOPs"

    def _specialise(self, training: bool) -> Optimised:
        """Capture and rewrite in one mode; in training with the schedule of evaluation."""
        state = self._gtp
        options = state.options
        if training:
            made = state.evaluation  # of the strategy, too, calibration may have chosen another
            options = replace(options, flops_budget=None, latency_budget=None, calibration=None)
            options = replace(options, schedule=made.schedule, strategy=made.strategy)
        if options.calibration is not None:
            options = replace(options, calibration=bound(options.calibration, state.signature.canonical))
        optimised = run_passes(capture_module(state.original, state.signature, training), options)
        _share(optimised.graph_module, self)
        state.by_mode[training] = optimised
        return optimised

    def _runner(self) -> Any:
        """What computes the current mode: the graph module, or its compiled form."""
        state, training, device = self._gtp, self.training, self._device()
        if (training, device) not in state.runners:
            optimised = state.by_mode.get(training) or self._specialise(training)
            graph_module: Any = optimised.graph_module
            if state.compile:
                options = dict(state.options.target.inductor) or None
                graph_module = torch.compile(self._lowered(graph_module, device), options=options)
            state.runners[training, device] = graph_module
        return state.runners[training, device]

    def _lowered(self, graph_module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
        """Over this module's parameters, too."""
        kernels = lowered(graph_module, device)
        if kernels is not graph_module:
            _share(kernels, self)
        return kernels

    def _device(self) -> torch.device:
        """Where it is now: `.to()` may have moved it since it was captured."""
        held = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if held is None else held.device


@dataclass
class _State:
    """What an OptimizedModel keeps beside its parameters. by_mode: by `training`; runners: by that and the device."""

    original: nn.Module
    signature: CallSignature
    options: Options
    compile: bool
    by_mode: dict[bool, Optimised] = field(default_factory=dict)
    runners: dict[tuple[bool, torch.device], Any] = field(default_factory=dict)

    @property
    def evaluation(self) -> Optimised:
        return self.by_mode[False]


def _parameter_tree(module: nn.Module, seen: dict[nn.Module, nn.Module]) -> nn.Module:
    """Bare modules with the parameters and buffers of `module` under the same names."""
    if module in seen:
        return seen[module]
    bare = seen[module] = nn.Module()
    bare._parameters.update(module._parameters)
    bare._buffers.update(module._buffers)
    bare._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    bare._modules.update({name: child and _parameter_tree(child, seen) for name, child in module._modules.items()})
    bare.training = module.training
    return bare


def _share(graph_module: fx.GraphModule, owner: nn.Module) -> None:
    """Let `graph_module` read its parameters from `owner`; what only the graph has (lifted constants) moves there."""
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            path, _, leaf = node.target.rpartition(".")
            holder = owner.get_submodule(path)
            if leaf not in holder._parameters and leaf not in holder._buffers:
                holder._buffers[leaf] = getattr(graph_module.get_submodule(path), leaf)
                holder._non_persistent_buffers_set.add(leaf)
    graph_module._parameters, graph_module._buffers = owner._parameters, owner._buffers
    graph_module._modules = owner._modules
