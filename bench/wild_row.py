"""What becomes of one class of a library: reduced, refused by name, wrong, crashed, or skipped.

Both entry points are tried. `optimize` at budget 1.0 has to return the original's results, on two batches, and at
BUDGET no more than its share of the FLOPs, by torch's own counter. What Dynamo makes has to be the same.
"""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gtp_fx
from bench.counted import flops
from bench.dynamo_door import Door
from bench.live_weights import enliven
from bench.wild_models import WildModel
from bench.zoo import difference
from gtp_fx.errors import GtpError

BUDGET = 0.74
EXACT = 1e-4
"""Largest difference over a tensor's largest value, in float32 and with gains that trained weights wouldn't have."""
OWN_COUNT = 5e-3
"""How far the report's ratio may be below the one that torch counts."""
MOST_MOVED = 1e3
"""Farther than any token that leaves can move the outputs, relative to the largest."""
VERDICTS = ("reduced", "lowest", "refused", "WRONG", "CRASH", "skipped")
"""What may become of a class; "lowest": it can't be reduced to BUDGET, and was to the lowest ratio that it can."""


@dataclass(frozen=True)
class Row:
    """What happened to one class.

    verdict: of VERDICTS. message: the refusal, the exception, or what is wrong.
    exact: relative error at budget 1.0, the larger of two batches'; None where that is refused as well.
    ratio: FLOPs at that budget / before, as torch counts them. moved: relative change of the outputs there.
    sites: attention blocks at which tokens leave, of `blocks`. dynamo: what the other entry point made of it.
    seconds: of processor time. commit: of this project, at which the row was measured.
    """

    library: str
    name: str
    verdict: str
    message: str = ""
    exact: float | None = None
    ratio: float | None = None
    moved: float | None = None
    sites: int = 0
    blocks: int = 0
    dynamo: str = ""
    seconds: float = 0.0
    commit: str = ""


class _Wrong(Exception):
    """A promise that was broken, in one line."""


def measure(entry: WildModel, dynamo: bool = True) -> Row:
    """Return the class's row; an exception other than a refusal is one too."""
    start = time.process_time()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        row = _measured(entry, dynamo)
    return replace(row, seconds=round(time.process_time() - start, 1))


def _measured(entry: WildModel, dynamo: bool) -> Row:
    row = Row(entry.library, entry.name, "reduced")
    try:
        model, calls, wanted = _original(entry)
    except Exception as error:  # the library isn't installed, is another version, or doesn't run with this torch
        return replace(row, verdict="skipped", message=_first_line(error))
    refusal: Exception | None = None
    fast, budget = None, BUDGET
    try:
        row = replace(row, exact=_exactness(model, calls, wanted))
        row, fast, budget = _at_budget(row, model, calls, wanted)
    except _Wrong as wrong:
        return replace(row, verdict="WRONG", message=str(wrong))
    except Exception as error:
        if not _is_refusal(error):
            return replace(row, verdict="CRASH", message=_crash(error))
        refusal = error
        row = replace(row, verdict="refused", message=_first_line(error, lines=3))
    if not dynamo:
        return row
    try:
        return replace(row, dynamo=_dynamo(model, calls, wanted, fast, refusal, budget))
    except _Wrong as wrong:
        return replace(row, verdict="WRONG", message=f"Dynamo: {wrong}")
    except Exception as error:
        if without := _fails_without_us(model, calls):
            return replace(row, dynamo=f"torch.compile fails with backend='eager' as well: {without}")
        return replace(row, verdict="CRASH", message=f"Dynamo: {_crash(error)}")


def _at_budget(
    row: Row, model: nn.Module, calls: list[tuple[Tensor, ...]], wanted: list[Any]
) -> tuple[Row, Any, float]:
    """Return the row, the model and the budget: BUDGET, or the lowest ratio that the class can be reduced to."""
    try:
        fast = _optimised(model, calls[0], BUDGET)
        return _reduced(row, model, fast, calls, wanted, BUDGET), fast, BUDGET
    except gtp_fx.BudgetError as error:
        if error.lowest is None or error.lowest >= 1:
            raise
        fast = _optimised(model, calls[0], error.lowest)
        row = replace(row, verdict="lowest", message=_first_line(error, lines=3))
        return _reduced(row, model, fast, calls, wanted, error.lowest), fast, error.lowest


def _original(entry: WildModel) -> tuple[nn.Module, list[tuple[Tensor, ...]], list[Any]]:
    """Return the model with live weights, its two calls and their results."""
    torch.manual_seed(0)
    model = enliven(entry.build()).eval().requires_grad_(False)
    calls = [entry.call(batch, seed=batch) for batch in (2, 3)]
    wanted = [_run(model, call) for call in calls]
    if not all(leaf.isfinite().all() for leaf in pytree.tree_leaves(wanted) if isinstance(leaf, Tensor)):
        raise ValueError("the original's results are not finite")
    return _in_double(model, calls, wanted) or (model, calls, wanted)


def _in_double(
    model: nn.Module, calls: list[tuple[Tensor, ...]], wanted: list[Any]
) -> tuple[nn.Module, list[tuple[Tensor, ...]], list[Any]] | None:
    """Return the three in float64 where rounding alone moves float32's results too far to compare anything with them.

    So it does where each layer magnifies its input, as one without norms may with random weights. None where it
    doesn't, or where the class has float32 written into it.
    """
    try:
        exact = copy.deepcopy(model).double()
        given = [tuple(value.double() if value.is_floating_point() else value for value in call) for call in calls]
        results = [_run(exact, call) for call in given]
    except Exception:  # any that its code raises: it doesn't run in float64
        return None
    moved = max(difference(mine, right) for mine, right in zip(wanted, results, strict=True))
    return (exact, given, results) if moved > EXACT / 10 else None


def _exactness(model: nn.Module, calls: list[tuple[Tensor, ...]], wanted: list[Any]) -> float:
    exact = _optimised(model, calls[0], 1.0)
    error = max(difference(_run(exact, call), right) for call, right in zip(calls, wanted, strict=True))
    if not error < EXACT:
        raise _Wrong(f"not exact at budget 1.0: {error:.1e}")
    return error


def _reduced(
    row: Row, model: nn.Module, fast: Any, calls: list[tuple[Tensor, ...]], wanted: list[Any], budget: float
) -> Row:
    report = fast.report
    try:
        before = _flops(model, calls[0])
    except TypeError as error:  # torch's counter can't run what calls flex_attention; the optimised graph holds none
        if "flex_attention" not in str(error):
            raise
        before = report.flops_before * len(calls[0][0])
    ratio = _flops(fast, calls[0]) / before
    moved = difference(_run(fast, calls[1]), wanted[1])
    row = replace(row, ratio=ratio, moved=moved, sites=len(report.sites), blocks=report.blocks)
    if not ratio <= budget + 1e-3:
        raise _Wrong(f"over budget: {ratio:.4f} by torch's counter, {report.flops_ratio:.4f} reported")
    # A forward may compute what nothing reads: torch counts it before, and a graph doesn't have it.
    if ratio - report.flops_ratio > OWN_COUNT:
        raise _Wrong(f"{ratio:.4f} by torch's counter, {report.flops_ratio:.4f} reported")
    if not 0 < moved < MOST_MOVED:
        raise _Wrong(f"outputs moved by {moved:.1e}")
    return row


def _dynamo(
    model: nn.Module,
    calls: list[tuple[Tensor, ...]],
    wanted: list[Any],
    fast: Any,
    refusal: Exception | None,
    budget: float,
) -> str:
    """Return how torch.compile's entry point compares with what `optimize` returned or raised."""
    calls = [tuple(value.clone() for value in call) for call in calls]  # without what a capture has marked on them
    result, door = _through_dynamo(model, calls[:1], budget)
    for error in door.refused:
        if not _is_refusal(error):
            raise error
    if not difference(result[0], wanted[0]) < MOST_MOVED:
        raise _Wrong("other shapes than the original's, or results that are not finite")
    pieces = len(door.made) + len(door.refused)
    told = f"{len(door.made)} of {pieces} graphs reduced"
    if pieces == 1 and refusal is not None and door.refused and type(door.refused[0]) is type(refusal):
        return "agree"
    if pieces == 1 and fast is not None and door.made:
        how = "agree"
        if list(door.made[0].schedule) != list(fast.schedule):
            # Work that images share is a smaller part of a batch that is baked in, so its budget takes fewer tokens.
            how = "agree, batch open"
            result, door = _through_dynamo(model, [tuple(_open(value) for value in calls[0])], budget)
        if door.made and list(door.made[0].schedule) == list(fast.schedule):
            apart = difference(result[0], _run(fast, calls[0]))
            if not apart < EXACT:
                raise _Wrong(f"apart from optimize by {apart:.1e}, with the same schedule")
            return how
        told = f"another schedule: {[list(made.schedule) for made in door.made]}, optimize's is {list(fast.schedule)}"
    elif door.refused and fast is not None:
        told += f": {_first_line(door.refused[-1])}"
    result, _ = _through_dynamo(model, calls, 1.0)
    error = max(difference(mine, right) for mine, right in zip(result, wanted, strict=True))
    if not error < EXACT:
        raise _Wrong(f"not exact at budget 1.0: {error:.1e} ({told})")
    return told


def _through_dynamo(model: nn.Module, calls: Sequence[tuple[Tensor, ...]], budget: float) -> tuple[list[Any], Door]:
    """Return the calls' results, and the backend that Dynamo gave its graphs to."""
    torch._dynamo.reset()
    door = Door(keep_refused=True, flops_budget=budget)
    compiled = torch.compile(model, backend=door)
    results = [_run(compiled, call) for call in calls]
    torch._dynamo.reset()
    return results, door


def _fails_without_us(model: nn.Module, calls: Sequence[tuple[Tensor, ...]]) -> str:
    """Return the error of torch.compile with a backend that changes nothing, "" where it has none."""
    torch._dynamo.reset()
    try:
        for call in calls:
            _run(torch.compile(model, backend="eager"), call)
    except Exception as error:
        return _first_line(error)
    finally:
        torch._dynamo.reset()
    return ""


def _open(value: Tensor) -> Tensor:
    """Return the input with its batch left open where the model leaves it."""
    value = value.clone()
    torch._dynamo.maybe_mark_dynamic(value, 0)
    return value


def _optimised(model: nn.Module, call: tuple[Tensor, ...], budget: float) -> Any:
    return gtp_fx.optimize(model, flops_budget=budget, example_inputs=call, compile=False)


def _run(model: Callable[..., Any], call: tuple[Tensor, ...]) -> Any:
    torch.manual_seed(0)  # some draw a mask, or noise
    return model(*call)


def _flops(model: nn.Module, call: tuple[Tensor, ...]) -> int:
    """Count the FLOPs of a call as `_run` makes it."""
    return flops(lambda *inputs: _run(model, inputs), call)


def _is_refusal(error: Exception) -> bool:
    """Tell whether gtp_fx refused by name; an InternalError is a crash, however well it is told."""
    return isinstance(error, GtpError) and type(error).__name__ != "InternalError"


def _crash(error: Exception) -> str:
    """The exception, and the innermost line of ours that it passed through."""
    inner: BaseException = getattr(error, "inner_exception", None) or error
    told, trace, where = f"{type(inner).__name__}: {_first_line(inner)}", inner.__traceback__, ""
    while trace is not None:
        code = trace.tb_frame.f_code
        if any(f"/{folder}/" in code.co_filename for folder in ("gtp_fx", "passes", "targets")):
            where = f"{'/'.join(code.co_filename.split('/')[-2:])}:{trace.tb_lineno}"
        trace = trace.tb_next
    return f"{told} [{where}]" if where else told


def _first_line(error: BaseException, lines: int = 1) -> str:
    """Return an error's first lines as one, with files by their place in a library."""
    told = " ".join(" ".join(str(error).strip().splitlines()[:lines]).split())
    return re.sub(r"[^\s\[]*/(?:site|dist)-packages/", "", told)[:400] or type(error).__name__
