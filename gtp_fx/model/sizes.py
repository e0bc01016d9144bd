"""Which of a model's forms takes a call, and how one is made for another image size: with a schedule of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from gtp_fx.capture.descriptions import describe
from gtp_fx.capture.signatures import Call, CallSignature, refusal
from gtp_fx.errors import GtpError, InputError, OptionError, ScheduleError
from gtp_fx.graph.torch_internals import is_traced
from gtp_fx.model.state import State
from gtp_fx.options.calibration import calls_of
from gtp_fx.options.options import Options
from gtp_fx.strategies import Auto

SIZES = ("given", "any")
"""Values of `optimize`'s `sizes`: those of the examples, or any."""

Make = Callable[[Any, CallSignature, Options, bool, tuple[str, ...]], Any]
"""Makes an OptimizedModel of a module, over the same parameters: the module, how it is called, with which options, and
whether a graph without attention over patches is refused, and its taps."""

MAKING = threading.RLock()
"""Held while a form or a method is made, so that threads that call it first at once make it once."""


_UNTRACED: list[Callable[..., Any]] = []
"""`_at_first_call` as Dynamo leaves it alone, once there is a model: to say so imports Dynamo, which takes a second."""


def prepare() -> None:
    """Prepare `form_taking`; a model does so when it is made or loaded."""
    if not _UNTRACED:
        reason = (
            "gtp_fx makes a graph for a new image size at its first call: call the model with it once, before it is "
            "compiled with fullgraph=True"
        )
        _UNTRACED.append(torch.compiler.disable(_at_first_call, reason=reason))


def checked_sizes(value: Any) -> bool:
    """Return whether a new size makes a graph, by `optimize`'s `sizes`. Raises OptionError for any other value."""
    if value not in SIZES:
        raise OptionError(f"sizes={value!r}: give 'given' (those of example_inputs alone) or 'any'")
    return bool(value == "any")


def must_be_calibrated_for(options: Options, signatures: Sequence[CallSignature], any_size: bool) -> None:
    """Raise InputError where a batch of calibration images has no form that the model is called in."""
    for args, kwargs in () if options.calibration is None else calls_of(options.calibration):
        if any(signature.takes(args, kwargs, any_size) for signature in signatures):
            continue
        known = " or ".join(form.described for form in signatures)
        same = any(len(args) == len(form.args) and kwargs.keys() == form.kwargs.keys() for form in signatures)
        advice = "with images of the size that the model is called with" if same else "without labels and the like"
        raise InputError(
            f"calibration: a batch of the calibration images is {describe(args, kwargs)}, and the model is optimised "
            f"for {known}: give batches {advice}" + ("" if same else ", [images for images, labels in loader]")
        )


def form_taking(state: State, call: Call, make: Make) -> Any:
    """Return the optimised model, of those beside `state`'s own, that takes a call in canonical form.

    It is made at the first call of a size. Raises InputError where the call has no form of this model's.
    """
    found = state.forms.taking(call)
    if found is not None:
        return found
    forms = state.of_each_form
    like = next((form for form in forms if form.signature.is_form_of(call, any_size=True)), None)
    if like is None or not state.any_size:
        raise InputError(refusal([form.signature for form in forms], call))
    return _UNTRACED[0](state, like, call, make)


def _at_first_call(state: State, like: State, call: Call, make: Make) -> Any:
    """Make the form for a call of a new size, or return what another thread has made of it meanwhile.

    like: the state of a form that differs from the call only in sizes.
    """
    if is_traced():  # torch.export traces by running
        raise InputError(f"{describe(*call)} is a size that this model wasn't called with yet: do so before exporting")
    with MAKING:
        found = state.forms.taking(call)
        if found is None:
            found = add_form(state, like.signature.like(like.original, like.dtype).resized(call), make)
        return found


def add_form(state: State, signature: CallSignature, make: Make, for_good: bool = False) -> Any:
    """Make the optimised model of a form and add it to the state's forms.

    Its schedule is planned for it by the same options, under the first form's strategy where that was to be chosen.
    Counts that were given hold where it has as many tokens.

    for_good: whether it is never dropped for another.

    Raises what `optimize` raises, with the form.
    """
    form, options = signature.described, state.options
    if not isinstance(options.schedule, str):
        options = replace(options, schedule=state.settled.schedule)
    if isinstance(options.strategy, Auto):  # chosen once, for the first form
        options = replace(options, strategy=state.settled.strategy)
    try:
        model = make(state.original, signature, options, state.blocks_needed, state.taps)
    except ScheduleError as error:
        first = state.signature.described
        raise ScheduleError(
            f"{form} has other tokens than {first}, for which schedule= gives the counts: give a budget, by which each "
            f"size is planned for itself, or optimize the model for this size alone"
        ) from error
    except GtpError as error:
        if form not in str(error):
            error.args = (f"{form}: {error}", *error.args[1:])
        raise
    state.forms.add(model, for_good)
    return model
