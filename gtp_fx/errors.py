"""What can go wrong, as values: a `Refusal` names the place, the errors carry them to the person.

Every error of this package is a ValueError that tells the bad value, the good ones and the next step; none of them is
raised after a model was touched (`optimize` works on a captured copy of the graph).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Something the compiler left as it was, and why.

    layer: the module path where it happened ("blocks.3.attn"), or "" where the graph keeps none.
    operator: the operator as the graph spells it ("aten.conv2d.default").
    reason: one sentence, with what the user can do where there is something. source: the line of the model's code that called it,
    "timm/layers/attention.py:124", "" where the graph doesn't know.
    """

    layer: str
    operator: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        place = f"{self.layer}: " if self.layer else ""
        operator = f"{self.operator}: " if self.operator else ""
        return f"{place}{operator}{self.reason}" + (f" [{self.source}]" if self.source else "")


class GtpError(ValueError):
    """Base of every error that gtp_fx raises for something a user can change."""


class OptionError(GtpError):
    """An option has a value outside its range, or is unknown."""


class BudgetError(GtpError):
    """The budget can't be met; the message says the lowest ratio that can."""


class ScheduleError(GtpError):
    """A schedule doesn't fit the model: wrong length, or it removes more tokens than there are."""


class CaptureError(GtpError):
    """The model's graph could not be captured with the example inputs at hand."""


class InputError(GtpError):
    """An optimised model was called with inputs it is not specialised for."""


class UnsupportedModelError(GtpError):
    """The graph has nothing that tokens can be removed from, or something that forbids it.

    refusals: one entry per place, in graph order.
    """

    def __init__(self, message: str, refusals: tuple[Refusal, ...] = ()) -> None:
        self.refusals = refusals
        super().__init__("\n  - ".join([message, *map(str, refusals)]))


class NoBlocksError(UnsupportedModelError):
    """The graph has no self-attention over patch tokens at all."""


class CheckError(RuntimeError):
    """A model's output is wrong. Not a user's mistake, so no GtpError."""


class NotApplicable(Exception):
    """Why a reading of a graph doesn't hold: no rule, no layout, no branch. Caught where another reading is tried; no user sees it."""
