"""An nn.Module in another's place, with that one's attributes, methods, mode and parameters; copied and pickled so."""

from __future__ import annotations

import copy
import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from torch import nn

from gtp_fx.capture.signatures import CallSignature, tensors_in
from gtp_fx.capture.snapshots import attributes_of
from gtp_fx.model import following, graphs
from gtp_fx.model.methods import method_taking
from gtp_fx.model.parameters import SHARED, class_like, stand_for
from gtp_fx.model.sizes import prepare
from gtp_fx.model.state import Made, Runner, State
from gtp_fx.options.options import Options


class Replacement(nn.Module):
    """A module that stands for an original, which it keeps out of nn.Module's sight in its state.

    It has the original's parameters, modules and hooks: the very same dicts. Whatever else it lacks is looked up there.
    """

    _gtp: State

    @property
    def training(self) -> bool:  # type: ignore[override]
        """The original's mode."""
        return self._gtp.original.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_gtp" in self.__dict__:  # nn.Module's own __init__ sets a mode, and it is the original's
            self._gtp.original.training = mode

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
        """Call `do`, which may change the original, and follow the change."""
        return following.changing(self._gtp, self._evaluation_runner, do, *args, **kwargs)

    def _call_method(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the original: optimised where it takes tensors, else on the original itself."""
        state = self._gtp
        # A method without tensors (`reset_classifier`) reads the original or changes it.
        if not tensors_in((args, kwargs)):
            return self._changing(method, *args, **kwargs)
        fast = method_taking(state, name, (args, kwargs), self._beside)
        fast.training = self.training
        return fast(*args, **kwargs)

    @abstractmethod
    def _beside(
        self, module: nn.Module, signature: CallSignature, options: Options, blocks_needed: bool, taps: tuple[str, ...]
    ) -> Any:
        """Optimise another form of call, or a method, as this model was."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy everything but compiled code; the graphs are the same, over the copy's parameters."""
        state = self._gtp
        new: Self = _bare(self._made_of(), type(state.original))
        memo[id(self)] = new
        own = copy.deepcopy(self._own(), memo)
        twin = replace(state, original=copy.deepcopy(state.original, memo), graphs={}, runners={}, methods={})
        twin.forms = copy.deepcopy(state.forms, memo)
        new.__setstate__((twin, own))
        graphs.copy_graphs(state, twin, new)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle everything but graphs and code, which are made anew, with the same schedule."""
        state = replace(self._gtp, graphs={}, runners={}, methods={})
        return _bare, (self._made_of(), type(self._gtp.original)), (state, self._own())

    def __setstate__(self, state: tuple[State, dict[str, Any]]) -> None:
        """Take a state, and let this module have the parameters and modules of the original in it."""
        prepare()
        object.__setattr__(self, "_gtp", state[0])
        self.__dict__.update(state[1])
        stand_for(self, state[0].original)

    def _made_of(self) -> type[Self]:
        """Return the class as it was written, which this one's, with the original's name, was made of."""
        return type(self).__base__  # type: ignore[return-value]

    def _own(self) -> dict[str, Any]:
        """Return this module's own attributes, beside those that it has from the original."""
        return {name: value for name, value in self.__dict__.items() if name not in SHARED and name != "_gtp"}

    def _evaluation(self) -> Made:
        """Return the graphs of the whole model's evaluation mode."""
        return graphs.made_for(self._gtp, self, graphs.evaluation_mode(self))

    def _evaluation_runner(self) -> Runner:
        """Return what runs the evaluation graph on the present device."""
        return graphs.runner_of(self._gtp, self, graphs.evaluation_mode(self))


def _bare(base: type[nn.Module], original: type[nn.Module]) -> Any:
    """Return an uninitialised module, whose state `__setstate__` fills in when it is copied or unpickled."""
    cls = class_like(base, original)
    return cls.__new__(cls)
