"""The nn.Module that `optimize` returns, which replaces the original.

It has the original's call, output type and shapes, and its parameters (names, order, storage). It takes any batch and
supports both modes, `.to()` and `state_dict()`. It has the original's attributes (`config`, `pretrained_cfg`, …) and
methods; methods that take tensors are optimised as well (`gtp_fx.capture.called_as`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from gtp_fx.capture.autocast_casts import clashes
from gtp_fx.capture.called_as import CalledAs
from gtp_fx.capture.inputs import CallSignature, call_signature, device_of, dtype_of, tensors_in
from gtp_fx.capture.module import capture_module
from gtp_fx.capture.regions import AUTOCAST
from gtp_fx.capture.snapshots import attributes_of
from gtp_fx.errors import InputError, ScheduleError
from gtp_fx.model.contents import Contents
from gtp_fx.model.internal_errors import internal_errors_told
from gtp_fx.model.parameters import (
    ModuleMap,
    class_like,
    copy_replaced,
    names_of,
    parameter_tree,
    share,
    shared_tensors,
    use_parameters_of,
)
from gtp_fx.model.pipeline import Optimised, run_passes
from gtp_fx.model.state import State, settled
from gtp_fx.options.calibration import bound
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import AUTO, Schedule
from gtp_fx.passes.lower.functional_linear import functional_linear
from gtp_fx.passes.lower.triton_kernels import lowered
from gtp_fx.report.provenance import Provenance, SiteRecord, output_and_provenance_runner, provenance_runner
from gtp_fx.report.report import Report
from gtp_fx.strategies import Strategy


class OptimizedModel(nn.Module):
    """An optimised vision transformer.

    `graph_module` is the rewritten graph, in `gtp_fx` and ATen operators; `report` says what was done to it. `schedule`
    and `strategy` say how many tokens each block removes, and how. Where it was made with `compile`, Inductor compiles
    the graph at the first call.
    """

    def __init__(
        self,
        original: nn.Module,
        signature: CallSignature,
        options: Options,
        compile: bool,
        blocks_needed: bool = True,
    ) -> None:
        """Capture `original` and rewrite its evaluation graph.

        signature: how the original is called, with examples.
        blocks_needed: whether a model without attention over patches is refused.
        """
        super().__init__()
        self.__class__ = class_like(OptimizedModel, type(original))
        twins: ModuleMap = {}
        tree = parameter_tree(original, twins)
        # The graphs and this module hold the very same dicts, so `.to()` and `load_state_dict` reach all of them.
        self._parameters, self._buffers, self._modules = tree._parameters, tree._buffers, tree._modules
        self._non_persistent_buffers_set = tree._non_persistent_buffers_set
        twins[original] = self
        # Set past nn.Module, which would register the original as a child and double every name.
        self._gtp: State
        object.__setattr__(self, "_gtp", State(original, signature, options, compile, blocks_needed, twins))
        self._gtp.first = self._optimised(training=False)
        self.training = original.training

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten evaluation graph, in `gtp_fx` and ATen operators."""
        return self._optimised(training=False).graph_module

    @property
    def report(self) -> Report:
        """FLOPs, sites, passes and refusals."""
        return self._gtp.chosen.report

    @property
    def schedule(self) -> Schedule:
        """Number of patch tokens that each attention block removes."""
        return self._gtp.chosen.schedule

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """The sites that remove tokens, as numbers of the graph's calls; none where tokens only skip branches."""
        return self._optimised(training=False).sites

    @property
    def strategy(self) -> Strategy:
        """The strategy that was given, or the one that calibration chose."""
        return self._gtp.chosen.strategy

    @property
    def inductor_options(self) -> dict[str, Any]:
        """Options for Inductor on this model's device: the target's, overridden by those of the mode."""
        return self._gtp.options.inductor(device_of(self))

    @property
    def signature(self) -> CallSignature:
        """The call's form, with examples of two images."""
        return self._gtp.signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode. Raises InputError where the call's form differs from the captured one."""
        args, kwargs = self._gtp.signature.canonical(args, kwargs)
        if clash := clashes(self._gtp.chosen.graph_module.meta.get(AUTOCAST, ())):
            raise InputError(clash)
        return self._runner()(*args, **kwargs)

    def provenance(self, *args: Any, **kwargs: Any) -> tuple[Provenance, ...]:
        """Return, for each stream of tokens, which patches each remaining token stands for, and by how much.

        Takes the model's own arguments. Runs the evaluation graph eagerly. Empty where no token is removed.
        """
        args, kwargs = self._gtp.signature.canonical(args, kwargs)
        evaluation = self._optimised(training=False)
        with internal_errors_told():
            run = provenance_runner(evaluation.graph_module, evaluation.sites, device_of(self))
        return run(*args, **kwargs)

    def with_provenance(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Provenance, ...]]:
        """Return the model's output and its `provenance`, from one run.

        Takes the model's own arguments. Where the output is a map of tokens in which removed ones have been put back,
        the tokens that remained to the end are those at `index`, after the prefix tokens: a reader of fewer tokens
        takes them.
        """
        args, kwargs = self._gtp.signature.canonical(args, kwargs)
        evaluation = self._optimised(training=False)
        with internal_errors_told():
            run = output_and_provenance_runner(evaluation.graph_module, evaluation.sites, device_of(self))
        return run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Look up what this module lacks on the original; its methods become optimised ones."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_gtp" or name.startswith("__"):
                raise
        value = getattr(self._gtp.original, name)  # raises the usual error where there is none
        return functools.partial(self._call_method, name, value) if inspect.ismethod(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; on the original, which its graphs depend on, where that has it (`global_pool`)."""
        state: State | None = self.__dict__.get("_gtp")
        if state is None or name == "training" or name not in attributes_of(state.original):
            super().__setattr__(name, value)
        else:
            self._changing(setattr, state.original, name, value)

    def _changing(self, do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `do`, which may change the original, and rebuild the graphs where it has; return what `do` returns."""
        before = Contents.of(self._gtp.original)
        result = do(*args, **kwargs)
        if not before.same(Contents.of(self._gtp.original)):
            self._remake(before)
        return result

    def _call_method(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the original: optimised where it takes tensors, else on the original itself."""
        state = self._gtp
        # A method without tensors (`reset_classifier`) reads the original or changes it.
        if not tensors_in((args, kwargs)):
            return self._changing(method, *args, **kwargs)
        made = state.methods.setdefault(name, [])
        fast = next((fast for fast in made if fast.signature.takes(args, kwargs)), None)
        if fast is None:
            fast = self._optimised_method(name, args, kwargs)
            made.append(fast)
        fast.training = self.training
        return fast(*args, **kwargs)

    def _optimised_method(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OptimizedModel:
        """Optimise a method of the original, over this model's parameters.

        It follows this model's schedule. A method without attention over patches has nothing to gain and runs eagerly.
        Raises ScheduleError where its blocks differ from the schedule's.
        """
        state = self._gtp
        module = CalledAs(state.original, getattr(state.original, name))
        example: Any = args if not kwargs else inspect.signature(module.forward).bind(*args, **kwargs).arguments
        options = settled(state.options, state.chosen)
        if not any(state.chosen.schedule):  # remove nothing here either, whatever blocks the method has
            options = replace(options, schedule=AUTO, flops_budget=1.0)
        try:
            with internal_errors_told():
                given = call_signature(module, example)
                fast = OptimizedModel(module, given, options, state.compile, blocks_needed=False)
        except ScheduleError as error:
            raise ScheduleError(f"{module._get_name()}: {error}") from error
        # The method's graphs and this model hold the very same dicts of parameters.
        fast._gtp.compile &= fast.report.blocks > 0
        fast._parameters, fast._buffers, fast._modules = self._parameters, self._buffers, self._modules
        fast._non_persistent_buffers_set = self._non_persistent_buffers_set
        for made in fast._gtp.by_mode.values():
            use_parameters_of(made.graph_module, self, names_of(state.original))
        return fast

    def _remake(self, before: Contents) -> None:
        """Capture and rewrite the original anew, with the same schedule, after it has changed.

        What the original still holds from `before` stays as this model holds it, possibly in another form (quantised).
        """
        state = self._gtp
        with internal_errors_told():
            made = self._rewritten(training=False)  # first, since it may fail: this model stays whole then
        twins: ModuleMap = {}
        tree = parameter_tree(state.original, twins)
        copy_replaced(state.twins, twins, before.tensors)
        # Refill this module's dicts in place: others hold them too.
        for mine, new in (
            (self._parameters, tree._parameters),
            (self._buffers, tree._buffers),
            (self._modules, tree._modules),
        ):
            mine.clear()
            mine.update(new)  # type: ignore[arg-type]
        state.twins = {**twins, state.original: self}
        state.forget()
        use_parameters_of(made.graph_module, self, names_of(state.original))
        state.first = state.by_mode[False] = made

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        """Run nn.Module's `_apply` (`.to()` and the like), and let the original follow."""
        with self._together():
            return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load as nn.Module does, and let the original follow."""
        with self._together():
            return super().load_state_dict(*args, **kwargs)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Keep the tensors that this model shares with the original shared, across a change of them.

        Parameters mostly change in place, but buffers are replaced, and with assign=True everything is. The examples
        move as well, since later captures run the original with them. A graph has dtypes written into it
        (`x.to(torch.float32)`), so a change of dtype discards the graphs.
        """
        state = self._gtp
        both, was = shared_tensors(state.twins), dtype_of(state.original)
        try:
            yield
        finally:
            for mine, theirs, name in both:
                theirs[name] = mine[name]
            for each in (self, *itertools.chain(*state.methods.values())):
                each._gtp.signature = each._gtp.signature.like(state.original, was)
            if dtype_of(state.original) != was:
                state.forget()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy or pickle everything but compiled code."""
        state = {**self.__dict__, "_gtp": replace(self._gtp, runners={})}
        return _bare, (type(self._gtp.original),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and let the graphs share this module's dicts again."""
        super().__setstate__(state)
        for made in self._gtp.by_mode.values():  # graph modules copy their dicts
            share(made.graph_module, self)

    def extra_repr(self) -> str:
        """Return the line that nn.Module's repr shows."""
        return f"optimised by gtp_fx, at {self.report.flops_ratio:.4f} of its FLOPs"

    def _optimised(self, training: bool) -> Optimised:
        """Return the rewritten graph of one mode, made at its first use."""
        state = self._gtp
        if training not in state.by_mode:
            with internal_errors_told():
                made = self._rewritten(training)
                use_parameters_of(made.graph_module, self, names_of(state.original))
            state.by_mode[training] = made
        return state.by_mode[training]

    def _rewritten(self, training: bool) -> Optimised:
        """Capture the original and rewrite its graph, with the schedule of the first graph once there is one."""
        state = self._gtp
        options = state.options if state.first is None else settled(state.options, state.first)
        if options.calibration is not None:
            options = replace(options, calibration=bound(options.calibration, state.signature.canonical))
        return run_passes(capture_module(state.original, state.signature, training), options, state.blocks_needed)

    def _runner(self) -> Any:
        """Return what runs the current mode on this device: the graph module, or its compiled form."""
        state, training, device = self._gtp, self.training, device_of(self)
        if (training, device) not in state.runners:
            optimised = self._optimised(training)
            with internal_errors_told():
                runner: Any = functional_linear(
                    lowered(optimised.graph_module, device, state.options.disabled_passes, state.options.target.told)
                    if state.compile
                    else optimised.graph_module
                )
                share(runner, self)
            if state.compile:
                runner = torch.compile(runner, options=self.inductor_options or None)
            state.runners[training, device] = runner
        return state.runners[training, device]


def _bare(original: type[nn.Module]) -> OptimizedModel:
    """Return an uninitialised model, whose state `__setstate__` fills in when it is copied or unpickled."""
    cls = class_like(OptimizedModel, original)
    return cls.__new__(cls)
