"""Optimised models of one module, by the form of call that each takes: a graph and a schedule for each image size."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from gtp_fx.capture.signatures import Call
from gtp_fx.graph.torch_internals import is_traced

MOST = 8
"""Forms that are kept of those met at run time. The one whose last call is longest ago is dropped for another."""


@dataclass(eq=False)
class _Kept:
    """One form.

    model: the optimised model that takes it.
    last: the number of its last call; infinite where it is never dropped.
    """

    model: Any
    last: float


@dataclass
class Forms:
    """Optimised models by form. Reading needs no lock: what is kept is replaced as a whole."""

    kept: tuple[_Kept, ...] = field(default=())
    calls: int = 0

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the optimised models, in the order in which they were made."""
        return (form.model for form in self.kept)

    def taking(self, call: Call) -> Any | None:
        """Return the model that takes a call in canonical form, or None."""
        for form in self.kept:
            if form.model._gtp.signature.is_form_of(call):
                if not is_traced() and form.last != math.inf:
                    self.calls += 1
                    form.last = self.calls
                return form.model
        return None

    def add(self, model: Any, for_good: bool = False) -> None:
        """Add a form; another is dropped where there are `MOST`, unless it is one that was added for good."""
        self.calls += 1
        dropped = sorted((form for form in self.kept if form.last != math.inf), key=lambda form: form.last)
        dropped = [] if for_good else dropped[: max(0, len(dropped) - MOST + 1)]
        new = _Kept(model, math.inf if for_good else self.calls)
        self.kept = (*(form for form in self.kept if form not in dropped), new)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forms:
        """Copy the models, with what `memo` has already: the module that they share."""
        return Forms(tuple(replace(form, model=copy.deepcopy(form.model, memo)) for form in self.kept), self.calls)
