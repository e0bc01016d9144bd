"""Operators that a call comes down to, and their FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def registered_formula(target: Any) -> Callable[..., int] | None:
    """Return torch's formula for the FLOPs of an operator; None where it has none. Takes a call's arguments, `out_val`.

    Public: `torch.utils.flop_counter.flop_registry`, by packets of overloads.
    """
    return cast("Callable[..., int] | None", flop_registry.get(getattr(target, "_overloadpacket", target)))


def run_counted(target: Any, args: Any, kwargs: Any) -> tuple[int, list[Any]]:
    """Run a call; return its FLOPs by torch's formulas, and the operators that it called last that have none.

    Public: `FlopCounterMode`, which doesn't tell the operators, and takes a hundred times as long to enter.
    """
    mode = _Counting()
    with mode:
        target(*args, **kwargs)
    return mode.flops, mode.called


class _Counting(TorchDispatchMode):
    """What `FlopCounterMode` does to a call: take it apart as far as it goes, and apply formulas to the pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.called: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:
            inside = func.decompose(*args, **(kwargs or {}))
        if inside is not NotImplemented:
            return inside
        result = func(*args, **(kwargs or {}))
        formula = registered_formula(func)
        if formula is None:
            self.called.append(func)
        else:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def dispatched(run: Callable[[], Any]) -> tuple[Any, list[tuple[Any, tuple[Any, ...], Any]]]:
    """Return what `run` returns and the operators that it comes down to: (operator, arguments, result) in order.

    Autocast and composite operators are resolved by then. Public: none; `torch.library` dispatches one operator.
    """
    calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            calls.append((func, args, result))
            return result

    with Recorder():
        return run(), calls
