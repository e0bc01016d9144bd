"""The nn.Module that `optimize` returns, which replaces the original.

It has the original's call, output type and shapes, and its parameters and modules: the very same ones, under the same
names. Layers are called by its graph as they are, with their hooks; what holds them (a block) isn't called. It takes
any batch and supports both modes, `.to()` and `state_dict()`. It has the original's attributes (`config`,
`pretrained_cfg`, …) and methods; methods that take tensors are optimised as well (`gtp_fx.capture.called_as`).
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from gtp_fx.capture.autocast_casts import clashes
from gtp_fx.capture.called_as import CalledAs
from gtp_fx.capture.inputs import CallSignature, call_signature, device_of, dtype_of, tensors_in
from gtp_fx.capture.layers import OWN_CALLS
from gtp_fx.capture.module import capture_module
from gtp_fx.capture.snapshots import attributes_of
from gtp_fx.errors import InputError, ScheduleError
from gtp_fx.graph import edit
from gtp_fx.graph.torch_internals import tracing_lock
from gtp_fx.model import following
from gtp_fx.model.internal_errors import internal_errors_told
from gtp_fx.model.parameters import SHARED, class_like, lend, names_of, names_read, read_from, stand_for
from gtp_fx.model.pipeline import Optimised, run_passes
from gtp_fx.model.rollback import put_back_on_error
from gtp_fx.model.runner import make_runner
from gtp_fx.model.saving.write import save
from gtp_fx.model.state import Chosen, Made, Mode, Runner, State, settled
from gtp_fx.model.watch import NOTHING
from gtp_fx.options.calibration import bound
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import AUTO, Schedule
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
        recapture: bool = False,
        own_calls: frozenset[str] = frozenset(),
    ) -> None:
        """Capture `original` and rewrite its evaluation graph.

        signature: how the original is called, with examples.
        blocks_needed: whether a model without attention over patches is refused.
        recapture: whether a change of the model that its graph can't follow makes a new graph, and is no error.
        own_calls: paths of layers that no pass may join with others, beside those that aren't plain.
        """
        training = original.training
        self._gtp: State
        # Set past nn.Module, which would register the original as a child and double every name.
        state = State(
            original, signature, dtype_of(original), options, compile, recapture, blocks_needed, None, own_calls
        )
        object.__setattr__(self, "_gtp", state)
        super().__init__()
        original.training = training  # nn.Module's __init__ sets it, and it is the original's
        self.__class__ = class_like(OptimizedModel, type(original))
        stand_for(self, original)
        for path in self._runner(training=False).watch.hooks():
            following.tell_of_hooks([path])

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten evaluation graph, in `gtp_fx` and ATen operators."""
        return self._optimised(training=False).graph_module

    @property
    def captured_graph(self) -> fx.GraphModule:
        """The evaluation graph as it was captured, before it was rewritten."""
        return self._made(training=False).captured

    @property
    def report(self) -> Report:
        """FLOPs, sites, passes and refusals."""
        return self._gtp.settled.report

    @property
    def schedule(self) -> Schedule:
        """Number of patch tokens that each attention block removes."""
        return self._gtp.settled.schedule

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """The sites that remove tokens, as numbers of the graph's calls; none where tokens only skip branches."""
        return self._optimised(training=False).sites

    @property
    def strategy(self) -> Strategy:
        """The strategy that was given, or the one that calibration chose."""
        return self._gtp.settled.strategy

    @property
    def inductor_options(self) -> dict[str, Any]:
        """Options for Inductor on this model's device: the target's, overridden by those of the mode."""
        return self._gtp.options.inductor(device_of(self))

    @property
    def signature(self) -> CallSignature:
        """The call's form, with examples of two images, on the model's device and in its dtype."""
        return self._gtp.signature.like(self._gtp.original, self._gtp.dtype)

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The original's mode."""
        return self._gtp.original.training

    @training.setter
    def training(self, mode: bool) -> None:
        self._gtp.original.training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode.

        Raises InputError where the call's form differs from the captured one, or where the model was changed in a way
        that its graph doesn't follow.
        """
        args, kwargs = self._gtp.signature.canonical(args, kwargs)
        runner = self._runner(self.training)
        if not torch.compiler.is_compiling():  # what traces this has guards of its own
            if following.must_be_made_anew(self._gtp, runner.watch):
                runner = self._runner(self.training)
            lend(runner.graph_module, self, runner.top)
        if clash := clashes(runner.casts):
            raise InputError(clash)
        return runner.run(*args, **kwargs)

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

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the whole into a folder, from which `gtp_fx.load` makes it again: the same schedule and result.

        A model with a save_pretrained of its own (Hugging Face's) is written by that as well: the folder is also one
        of the original. Others' weights are in model.safetensors. A save that is broken off leaves nothing to load.

        options: what the original's own takes, such as `max_shard_size`.

        Raises SaveError where something of the model can't be in files.
        """
        state = self._gtp
        with internal_errors_told():
            self._changing(save, state, self.signature, Path(folder), options)

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
        """Call `do`, which may change the original, and make the graphs anew where it has; return what `do` returns.

        Where that fails, the original is put back as it was.
        """
        state = self._gtp
        graphs = dict(state.graphs), dict(state.runners), dict(state.methods)
        with put_back_on_error(state.original):
            result = do(*args, **kwargs)
            if any(runner.watch.changes() is not NOTHING for runner in state.runners.values()):
                state.forget()
                try:
                    self._runner(training=False)
                except BaseException:
                    state.graphs, state.runners, state.methods = graphs
                    raise
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
        options = settled(state.options, state.settled)
        if not any(state.settled.schedule):  # remove nothing here either, whatever blocks the method has
            options = replace(options, schedule=AUTO, flops_budget=1.0)
        try:
            with internal_errors_told():
                given = call_signature(module, example)
                return OptimizedModel(module, given, options, state.compile, False, state.recapture)
        except ScheduleError as error:
            raise ScheduleError(f"{module._get_name()}: {error}") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModel:
        """Copy everything but compiled code; the graphs are the same, over the copy's parameters."""
        state = self._gtp
        new = _bare(type(state.original))
        memo[id(self)] = new
        own = copy.deepcopy(self._own(), memo)
        twin = replace(state, original=copy.deepcopy(state.original, memo), graphs={}, runners={}, methods={})
        new.__setstate__((twin, own))
        for mode, made in state.graphs.items():
            captured, graph_module = map(edit.copy_of, (made.captured, made.optimised.graph_module))
            for gm in (captured, graph_module):
                edit.share(gm, new)
            twin.graphs[mode] = Made(captured, replace(made.optimised, graph_module=graph_module))
            if mode[1] == dtype_of(new):
                new._runner(mode[0])  # from now on it is noticed what is changed in the copy
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle everything but graphs and code, which are made anew, with the same schedule."""
        state = replace(self._gtp, graphs={}, runners={}, methods={})
        return _bare, (type(self._gtp.original),), (state, self._own())

    def __setstate__(self, state: tuple[State, dict[str, Any]]) -> None:
        """Take a state, and let this module have the parameters and modules of the original in it."""
        object.__setattr__(self, "_gtp", state[0])
        self.__dict__.update(state[1])
        stand_for(self, state[0].original)

    def _own(self) -> dict[str, Any]:
        """Return this module's own attributes, beside those that it has from the original."""
        return {name: value for name, value in self.__dict__.items() if name not in SHARED and name != "_gtp"}

    def extra_repr(self) -> str:
        """Return the line that nn.Module's repr shows."""
        return f"optimised by gtp_fx, at {self.report.flops_ratio:.4f} of its FLOPs"

    def _mode(self, training: bool) -> Mode:
        """Return the key of the graph for one mode and the weights' present dtype."""
        return training, dtype_of(self)

    def _optimised(self, training: bool) -> Optimised:
        """Return the rewritten graph of one mode."""
        return self._made(training).optimised

    def _made(self, training: bool) -> Made:
        """Return the graphs of one mode, made at their first use, or anew where a layer's own call is wanted since."""
        state, mode = self._gtp, self._mode(training)
        made = state.graphs.get(mode)
        if made is None:
            with internal_errors_told():
                captured = capture_module(state.original, self.signature, training)
                read_from(captured, self, names_of(state.original))
                made = state.graphs[mode] = self._rewritten(captured)
        elif not state.own_calls <= made.captured.meta[OWN_CALLS]:
            with internal_errors_told():
                made = state.graphs[mode] = self._rewritten(made.captured)
        return made

    def _rewritten(self, captured: fx.GraphModule) -> Made:
        """Rewrite a captured graph, with the schedule of the first one once there is one."""
        state = self._gtp
        options = state.options if state.chosen is None else settled(state.options, state.chosen)
        if options.calibration is not None:
            options = replace(options, calibration=bound(options.calibration, state.signature.canonical))
        state.own_calls |= following.own_calls(captured, state.original)
        captured.meta[OWN_CALLS] = state.own_calls
        made = run_passes(captured, options, state.blocks_needed)
        read_from(made.graph_module, self, names_read(captured))
        if state.chosen is None:
            state.chosen = Chosen(made.schedule, made.strategy, made.report)
        return Made(captured, made)

    def _runner(self, training: bool) -> Runner:
        """Return what runs one mode on the present device, made at its first use."""
        state, mode, device = self._gtp, self._mode(training), device_of(self)
        found = state.runners.get((mode, device))
        if found is None:
            with tracing_lock(), internal_errors_told():
                if (mode, device) not in state.runners:  # another thread may have made it meanwhile
                    made = self._made(training)
                    state.runners[mode, device] = make_runner(made, state, self, device, self.inductor_options)
                found = state.runners[mode, device]
        return found


def _bare(original: type[nn.Module]) -> OptimizedModel:
    """Return an uninitialised model, whose state `__setstate__` fills in when it is copied or unpickled."""
    cls = class_like(OptimizedModel, original)
    return cls.__new__(cls)
