"""Graphs of an optimised model: one for each mode that it is called in, and what runs it, each made at its first use.

A graph depends on `training`, on the weights' dtype and on parts that are in the other mode; what runs it, also on the
device. All of a model's graphs follow the schedule of the first, read the parameters of one owner, the
`OptimizedModel`, and are discarded when the original changes (`gtp_fx.model.following`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from gtp_fx.capture.autocast_casts import clashes
from gtp_fx.capture.layers import OWN_CALLS
from gtp_fx.capture.module import capture_call, capture_module
from gtp_fx.capture.other_forms import said_of_dtypes
from gtp_fx.capture.signatures import CallSignature, device_of, dtype_of
from gtp_fx.capture.tapped import with_taps
from gtp_fx.capture.turns import modules_of, running, tracing
from gtp_fx.errors import InputError, ScheduleError
from gtp_fx.graph import edit
from gtp_fx.graph.torch_internals import is_traced, out_of_sight, tracing_lock
from gtp_fx.model import following
from gtp_fx.model.collector import paused
from gtp_fx.model.internal_errors import internal_errors_reported
from gtp_fx.model.modes import parts_apart, parts_with_modes
from gtp_fx.model.parameters import lend, names_of, names_read, read_from
from gtp_fx.model.pipeline import run_passes
from gtp_fx.model.runner import make_runner, runner_with_kept
from gtp_fx.model.state import Chosen, Made, Mode, Runner, State, settled
from gtp_fx.options.calibration import bound_where
from gtp_fx.report.report import Report


def present_mode(state: State, owner: nn.Module) -> Mode:
    """Return the key of the graph for the present mode and dtype."""
    return owner.training, dtype_of(owner), parts_apart(state.parts, owner.training)


def evaluation_mode(owner: nn.Module) -> Mode:
    """Return the key of the graph for the whole model in evaluation mode, in the present dtype."""
    return False, dtype_of(owner), ()


def signature_now(state: State) -> CallSignature:
    """Return the form of calls, with examples on the original's present device and in its present dtype."""
    return state.signature.like(state.original, state.dtype)


def run(state: State, owner: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], with_kept: bool) -> Any:
    """Run the graph of the present mode on a call in canonical form.

    with_kept: return also which tokens the outputs have.

    Raises InputError where the model was changed in a way that its graph doesn't follow, or the dtypes are others.
    """
    if is_traced():  # what traces this has guards of its own
        return runner_of(state, owner, present_mode(state, owner), with_kept).run(*args, **kwargs)
    while True:
        with running(state.modules):  # not while another thread traces them
            mode = present_mode(state, owner)
            runner = state.runners.get((mode, device_of(owner), with_kept))
            if runner is not None and not following.must_be_made_anew(state, runner.watch):
                lend(runner.graph_module, owner, runner.top)
                if clash := clashes(runner.casts):
                    raise InputError(clash)
                try:
                    return runner.run(*args, **kwargs)
                except RuntimeError as error:
                    if told := said_of_dtypes(error, (args, kwargs), mode[1]):
                        raise InputError(told) from error
                    raise
        runner_of(state, owner, mode, with_kept)


def runner_of(state: State, owner: nn.Module, mode: Mode, with_kept: bool = False) -> Runner:
    """Return what runs one mode on the present device.

    with_kept: one that also returns which tokens the outputs have.
    """
    device = device_of(owner)
    key = (mode, device, with_kept)
    found = state.runners.get(key)
    if found is None:
        with tracing(state.original), tracing_lock(), internal_errors_reported(), out_of_sight():
            if key not in state.runners:  # another thread may have made it meanwhile
                # Calibration makes hundreds of graphs, which the collector alone frees.
                with paused() if state.options.calibration is None else contextlib.nullcontext():
                    made = made_for(state, owner, mode)
                state.modules = modules_of(state.original)
                make = runner_with_kept if with_kept else make_runner
                runner = make(made, state, owner, device, state.options.inductor(device))
                if mode == evaluation_mode(owner):  # whose graph calls no layer that depends on its mode
                    state.parts = parts_with_modes(state.original, runner.watch.called)
                state.runners[key] = runner
            found = state.runners[key]
    return found


def made_for(state: State, owner: nn.Module, mode: Mode) -> Made:
    """Return the graphs of one mode; made anew where a layer's own call is wanted since."""
    made = state.graphs.get(mode)
    if made is None:
        with internal_errors_reported():
            whole, (training, _, apart) = with_taps(state.original, state.taps), mode
            if state.graphs:
                captured = capture_module(whole, signature_now(state), training, apart)
            else:
                captured, signature = capture_call(whole, signature_now(state), training, apart)
                if signature.fixed:
                    state.signature = signature
            read_from(captured, owner, names_of(state.original))
            made = state.graphs[mode] = _rewritten(state, owner, captured)
    elif wanted := state.own_calls - (had := made.captured.meta[OWN_CALLS]):
        with internal_errors_reported():
            try:
                made = state.graphs[mode] = _rewritten(state, owner, made.captured)
            except BaseException as error:
                made.captured.meta[OWN_CALLS] = had  # so that the next call isn't taken for one that this graph serves
                if isinstance(error, ScheduleError):
                    raise InputError(following.not_called_whole(sorted(wanted))) from error
                raise
    return made


def _rewritten(state: State, owner: nn.Module, captured: fx.GraphModule) -> Made:
    """Rewrite a captured graph, with the schedule of the first one once there is one."""
    options = state.options if state.chosen is None else settled(state.options, state.chosen)
    if options.calibration is not None:
        form = state.signature
        options = replace(options, calibration=bound_where(options.calibration, form.takes, form.canonical))
    state.own_calls |= following.own_calls(captured, state.original)
    captured.meta[OWN_CALLS] = state.own_calls
    made = run_passes(captured, options, state.blocks_needed)
    read_from(made.graph_module, owner, names_read(captured))
    if state.chosen is None:
        state.chosen = Chosen(made.schedule, made.strategy, made.report)
    else:
        _must_rest_alike(state.chosen.report, made.report)
    return Made(captured, made)


def _must_rest_alike(first: Report, report: Report) -> None:
    """Check that windows rest at the same blocks in a graph as in the model's first, for which they were counted.

    Raises ScheduleError where they don't in one of the two: its counts would be taken for tokens.
    """
    before, now = ({row.layer for row in of.sites if row.window_tokens} for of in (first, report))
    for layer in sorted(before ^ now):
        resting, other = ("first", "present") if layer in before else ("present", "first")
        refusals = report.refusals if layer in before else first.refusals
        raise ScheduleError(
            f"windows of {layer} rest in the model's {resting} mode and dtype, and can't in its {other} one, so one "
            "schedule isn't for both: with strategy='regeneration(windows=skip)' both skip tokens"
            + "".join(f"\n  - {refusal}" for refusal in refusals)
        )


def copy_graphs(state: State, twin: State, owner: nn.Module) -> None:
    """Give `twin`, a model's copied state, copies of the graphs in `state`, over the parameters of its own `owner`."""
    for mode, made in state.graphs.items():
        captured, graph_module = map(edit.copy_of, (made.captured, made.optimised.graph_module))
        for gm in (captured, graph_module):
            edit.share(gm, owner)
        twin.graphs[mode] = Made(captured, replace(made.optimised, graph_module=graph_module))
        if mode[1] == dtype_of(owner):
            runner_of(twin, owner, mode)  # from now on it is noticed what is changed in the copy
