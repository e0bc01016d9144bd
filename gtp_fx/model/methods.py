"""Methods of an optimised model's original that take tensors: optimised as its forward is, with the same schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gtp_fx.capture.called_as import CalledAs
from gtp_fx.capture.inputs import signature_of
from gtp_fx.capture.signatures import Call, tensors_in
from gtp_fx.errors import GtpError, ScheduleError
from gtp_fx.model.forms import Forms
from gtp_fx.model.internal_errors import internal_errors_reported
from gtp_fx.model.sizes import MAKING, Make, form_taking
from gtp_fx.model.state import Chosen, State, settled
from gtp_fx.options.schedule import AUTO


def method_taking(state: State, name: str, call: Call, make: Make) -> Any:
    """Return the optimised method of this name that takes a call, made at its first call of this form.

    Raises InputError or CaptureError where the method doesn't take these arguments.
    """
    made = state.methods.setdefault(name, Forms())
    found = _found(made, call)
    if found is None:
        with MAKING, internal_errors_reported():
            found = _found(made, call)  # another thread may have made it meanwhile
            if found is None:
                found = _optimised(state, name, call, make)
                made.add(found)
    return found


def _found(made: Forms, call: Call) -> Any | None:
    """Return the one that takes a call. All forms of a method have its parameters, by which the call is read."""
    known = next((method._gtp.signature for method in made), None)
    return None if known is None else made.taking(known.bound(*call))


def _optimised(state: State, name: str, call: Call, make: Make) -> Any:
    """Optimise a method of the original, over the model's parameters.

    It follows the schedule of the model's form whose images are of its size. A method without attention over patches
    has nothing to gain and runs eagerly. Raises ScheduleError where its blocks differ from the schedule's.
    """
    module = CalledAs(state.original, getattr(state.original, name))
    signature = signature_of(module, call)
    signature = signature.resized((signature.args, signature.kwargs))
    first: ScheduleError | None = None
    for chosen in _schedules(state, call, make):
        options = settled(state.options, chosen)
        if not any(chosen.schedule):  # remove nothing here either, whatever blocks the method has
            options = replace(options, schedule=AUTO, flops_budget=1.0)
        try:
            return make(module, signature, options, False, ())
        except ScheduleError as error:
            first = first or error
    raise ScheduleError(f"{module._get_name()}: {first}") from first


def _schedules(state: State, call: Call, make: Make) -> Iterator[Chosen]:
    """Yield the schedules that a method called like this may follow, the likeliest first.

    Those of the forms whose images are as large as the method's; else that of the first form, then of one that is made
    for such images where the model takes them, then of all others.
    """
    sizes = _sizes(call)
    alike = [form for form in state.of_each_form if sizes & _sizes((form.signature.args, form.signature.kwargs))]
    if alike:
        yield from (form.settled for form in alike)
        return
    yield state.settled
    if state.any_size:
        with contextlib.suppress(GtpError):  # the method's arguments may be others than forward's
            yield form_taking(state, state.signature.bound(*call), make)._gtp.settled
    yield from (form.settled for form in state.of_each_form[1:])


def _sizes(call: Call) -> set[tuple[int, ...]]:
    return {tuple(tensor.shape[1:]) for tensor in tensors_in(call)}
