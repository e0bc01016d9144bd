"""What `optimize` returns: an nn.Module that stands in for the original.

Same call, same output type and shapes, same parameters (names, order, storage), any batch, both modes, `.to()`,
`state_dict()`, and the original's attributes (`config`, `pretrained_cfg`, …) and methods, those that take tensors optimised as well
(`gtp_fx.methods`).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from gtp_fx.capture import capture_module
from gtp_fx.config import Options
from gtp_fx.damage.calibration import Calibration, bound
from gtp_fx.errors import ScheduleError
from gtp_fx.inputs import CallSignature, call_signature, device_of, tensors_in
from gtp_fx.likeness import Twins, carry_over, class_like, held_by_both, parameter_tree, share
from gtp_fx.lowering import lowered
from gtp_fx.methods import CalledAs, Contents
from gtp_fx.passes.call_functions import call_functions
from gtp_fx.pipeline import Optimised, run_passes
from gtp_fx.provenance import Provenance, SiteRecord, output_and_provenance_runner, provenance_runner
from gtp_fx.report import Report
from gtp_fx.schedule import Schedule
from gtp_fx.strategies import Strategy
from gtp_fx.thresholds import Thresholds, mean_thresholds


class OptimizedModel(nn.Module):
    """An optimised vision transformer.

    graph_module: the rewritten graph, in `gtp_fx` and ATen operators. report: what was done. schedule, strategy: tokens that leave
    per block, and how. With `compile`, Inductor compiles the graph at the first call.
    """

    def __init__(
        self,
        original: nn.Module,
        signature: CallSignature,
        options: Options,
        compile: bool,
        blocks_needed: bool = True,
    ) -> None:
        super().__init__()
        self.__class__ = class_like(OptimizedModel, type(original))
        twins: Twins = {}
        tree = parameter_tree(original, twins)
        # The graphs and this module hold the very same dicts, so `.to()` and `load_state_dict` reach all of them.
        self._parameters, self._buffers, self._modules = tree._parameters, tree._buffers, tree._modules
        self._non_persistent_buffers_set = tree._non_persistent_buffers_set
        twins[original] = self
        # Set past nn.Module, which would register the original as a child and double every name.
        self._gtp: _State
        object.__setattr__(self, "_gtp", _State(original, signature, options, compile, blocks_needed, twins))
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
        return provenance_runner(evaluation.graph_module, evaluation.sites, device_of(self))(*args, **kwargs)

    def with_provenance(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Provenance, ...]]:
        """Called as the model is: what it returns, and `provenance`, from one run. Of a map of tokens that is returned, those that were left
        (and needn't have come back) are at `index`, behind the prefix: what a reader of fewer tokens takes."""
        args, kwargs = self._gtp.signature.canonical(args, kwargs)
        evaluation = self._gtp.evaluation
        run = output_and_provenance_runner(evaluation.graph_module, evaluation.sites, device_of(self))
        return run(*args, **kwargs)

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
        return functools.partial(self._call_method, name, value) if inspect.ismethod(value) else value

    def _call_method(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = self._gtp
        if not tensors_in((args, kwargs)):
            before = Contents.of(state.original)
            result = method(*args, **kwargs)
            if not before.same(Contents.of(state.original)):
                self._remake(before)
            return result
        made = state.methods.setdefault(name, [])
        fast = next((fast for fast in made if fast.signature.takes(args, kwargs)), None)
        if fast is None:
            fast = self._optimised_method(name, args, kwargs)
            made.append(fast)
        fast.training = self.training
        return fast(*args, **kwargs)

    def _optimised_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OptimizedModel:
        """Over this model's parameters. Without attention over patches there is nothing to win, so that it runs eagerly, as it is."""
        state = self._gtp
        module = CalledAs(state.original, getattr(state.original, name))
        example: Any = args if not kwargs else inspect.signature(module.forward).bind(*args, **kwargs).arguments
        options = _settled(state.options, state.evaluation)
        try:
            fast = OptimizedModel(module, call_signature(module, example), options, state.compile, blocks_needed=False)
        except ScheduleError as error:
            raise ScheduleError(f"{type(state.original).__name__}.{name}: {error}") from error
        fast._gtp.compile &= fast.report.blocks > 0
        fast._parameters, fast._buffers, fast._modules = self._parameters, self._buffers, self._modules
        for made in fast._gtp.by_mode.values():
            share(made.graph_module, self)
        return fast

    def _remake(self, before: Contents) -> None:
        """The original has other modules or parameters now than `before`: with the same schedule, from the start.

        What it still has stays as this model holds it, which may be in another form (quantised).
        """
        state = self._gtp
        twins: Twins = {}
        tree = parameter_tree(state.original, twins)
        carry_over(state.twins, twins, before.tensors)
        for mine, new in (
            (self._parameters, tree._parameters),
            (self._buffers, tree._buffers),
            (self._modules, tree._modules),
        ):
            mine.clear()
            mine.update(new)  # type: ignore[arg-type]
        state.options = _settled(state.options, state.evaluation)
        state.twins = {**twins, state.original: self}
        state.by_mode.clear()
        state.runners.clear()
        state.methods.clear()
        self._specialise(training=False)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        """`.to()` and its like. What is captured from now on is captured of the original, with the examples: both go along."""
        both = held_by_both(self._gtp.twins)
        super()._apply(fn, recurse)
        for mine, theirs, name in both:  # a parameter changes in place; buffers are renewed
            theirs[name] = mine[name]
        for each in (self, *itertools.chain(*self._gtp.methods.values())):
            each._gtp.signature = each._gtp.signature.map(fn)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare, (type(self._gtp.original),), self.__dict__

    def extra_repr(self) -> str:
        return f"optimised by gtp_fx, at {self.report.flops_ratio:.4f} of its FLOPs"

    def _specialise(self, training: bool) -> Optimised:
        """Capture and rewrite in one mode; in training with the schedule of evaluation."""
        state = self._gtp
        options = _settled(state.options, state.evaluation) if training else state.options
        if options.calibration is not None:
            options = replace(options, calibration=bound(options.calibration, state.signature.canonical))
        optimised = run_passes(capture_module(state.original, state.signature, training), options, state.blocks_needed)
        share(optimised.graph_module, self)
        state.by_mode[training] = optimised
        return optimised

    def _runner(self) -> Any:
        """What computes the current mode: the graph module, or its compiled form."""
        state, training, device = self._gtp, self.training, device_of(self)
        if (training, device) not in state.runners:
            optimised = state.by_mode.get(training) or self._specialise(training)
            runner: Any = call_functions(
                lowered(optimised.graph_module, device, state.options.disabled_passes)
                if state.compile
                else optimised.graph_module
            )
            share(runner, self)
            if state.compile:
                runner = torch.compile(runner, options=dict(state.options.target.inductor) or None)
            state.runners[training, device] = runner
        return state.runners[training, device]


def _bare(original: type[nn.Module]) -> OptimizedModel:
    """To be filled with another one's state: a copy, or what was pickled."""
    cls = class_like(OptimizedModel, original)
    return cls.__new__(cls)


@dataclass
class _State:
    """What an OptimizedModel keeps beside its parameters. blocks_needed: as `run_passes` has it. by_mode: by `training`; runners: by that
    and the device. methods: the original's, by name, one for each form of arguments."""

    original: nn.Module
    signature: CallSignature
    options: Options
    compile: bool
    blocks_needed: bool
    twins: Twins
    by_mode: dict[bool, Optimised] = field(default_factory=dict)
    runners: dict[tuple[bool, torch.device], Any] = field(default_factory=dict)
    methods: dict[str, list[OptimizedModel]] = field(default_factory=dict)

    @property
    def evaluation(self) -> Optimised:
        return self.by_mode[False]


def _settled(options: Options, made: Optimised) -> Options:
    """The schedule that was made, with its strategy, which calibration may have chosen; no budget."""
    options = replace(options, flops_budget=None, latency_budget=None, calibration=None)
    return replace(options, schedule=made.schedule, strategy=made.strategy)
