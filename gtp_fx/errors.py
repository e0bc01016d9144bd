"""The package's errors, and the refusals they report.

Every `GtpError` is a ValueError whose message names the bad value, the accepted ones and the next step; an
`InternalError` names the place and how to report it. None is raised after a model was modified, because `optimize`
works on a captured copy of the graph.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Refusal:
    """An operator or block that the compiler did not change, and why.

    layer: module path ("blocks.3.attn"), or "" where the graph records none.
    operator: the operator as the graph spells it ("aten.conv2d.default").
    reason: one sentence, including what the user can do where there is something to do.
    source: line of the model's code that called the operator ("timm/layers/attention.py:124"), or "" where unknown.
    """

    layer: str
    operator: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        place = f"{self.layer}: " if self.layer else ""
        operator = f"{self.operator}: " if self.operator else ""
        return f"{place}{operator}{self.reason}" + (f" [{self.source}]" if self.source else "")


_OURS = ("gtp_fx", "contextlib", "functools")
"""First parts of the names of modules that stand between a user's call and a warning."""


def warn(message: str) -> None:
    """Warn (UserWarning) at the line of the user's code that called gtp_fx, however deep inside it is noticed."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


MOST_CAUSES = 6
"""The most causes that a message lists."""


def merged(refusals: Iterable[Refusal]) -> tuple[Refusal, ...]:
    """Return one refusal for each cause, in order, with the layers that share it: "blocks.0 … blocks.11"."""
    layers: dict[tuple[str, str], dict[str, None]] = {}
    first: dict[tuple[str, str], Refusal] = {}
    for refusal in refusals:
        cause = (refusal.operator, refusal.reason)
        first.setdefault(cause, refusal)
        layers.setdefault(cause, {})[refusal.layer] = None
    return tuple(replace(refusal, layer=_span(list(layers[cause]))) for cause, refusal in first.items())


def _span(layers: list[str]) -> str:
    """Return some layers in a few words: all of up to two, else the first and the last."""
    return ", ".join(filter(None, layers)) if len(layers) < 3 else f"{layers[0]} … {layers[-1]} ({len(layers)} layers)"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message, "; did you mean 'batch'?", with the nearest of the known words; "" for none."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class GtpError(ValueError):
    """Base class of every error that the user can fix, and of `InternalError`."""


class OptionError(GtpError):
    """An option has a value outside its range, or is unknown."""


class BudgetError(GtpError):
    """The budget can't be met; the message gives the lowest ratio that can.

    lowest: that ratio, which is a budget that can be met; None where the error is about a given schedule.
    """

    def __init__(self, message: str, lowest: float | None = None) -> None:
        super().__init__(message)
        self.lowest = lowest


class ScheduleError(GtpError):
    """A schedule doesn't fit the model: wrong length, or it removes more tokens than there are."""


class CaptureError(GtpError):
    """The model's graph could not be captured with the given example inputs."""


class SaveError(GtpError):
    """An optimised model can't be saved whole."""


class ExportError(GtpError):
    """An optimised model can't be written to a file: its format is unknown, or can't hold this model."""


class LoadError(GtpError):
    """A model can't be loaded: its name is unknown, or its files are missing, unreadable or another model's."""


class InputError(GtpError):
    """An optimised model was called with inputs of a form it was not specialised for."""


class UnsupportedModelError(GtpError):
    """No tokens can be removed: the graph has no suitable attention, or contains something that forbids it.

    refusals: one entry per place or cause, in graph order. The message has a line for each cause; one alone stands in
        its first line.
    """

    def __init__(self, message: str, refusals: tuple[Refusal, ...] = ()) -> None:
        self.refusals = refusals
        causes = list(map(str, merged(refusals)))
        if len(causes) == 1:  # the headline has it
            message, causes = f"{message.removesuffix(':')}: {causes[0]}", []
        if len(causes) > MOST_CAUSES:
            causes[MOST_CAUSES - 1 :] = [f"and {len(causes) - MOST_CAUSES + 1} more causes"]
        super().__init__("\n  - ".join([message, *causes]))


class NoBlocksError(UnsupportedModelError):
    """The graph has no block of self-attention over patch tokens, or none that could be followed."""


class PieceError(GtpError):
    """A piece of a model between graph breaks, whose inputs come in as arguments, can't be reduced as required."""


class InternalError(GtpError):
    """gtp_fx met what it didn't foresee: a fault of its own, raised from the error itself (`__cause__`).

    where: the step, the operator, the layer and the line of the model's source, as far as known.
    """

    def __init__(self, message: str, where: str = "") -> None:
        self.where = where
        super().__init__(message)


class BusyError(GtpError):
    """This machine is too busy with other work to be measured."""


class CheckError(RuntimeError):
    """A model's output is wrong. Not a GtpError, because the user can't fix it."""


class NotApplicable(Exception):
    """A reading of a graph that doesn't hold, with the reason: no rule, no layout, no branch.

    Caught where another reading is tried, so that no user sees it.
    """
