"""The function `optimize`, for modules."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gtp_fx.capture.inputs import call_signatures
from gtp_fx.capture.tapped import check_taps
from gtp_fx.capture.wrapped import without_compiling
from gtp_fx.errors import OptionError
from gtp_fx.model.internal_errors import internal_errors_reported
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.model.sizes import checked_sizes, must_be_calibrated_for
from gtp_fx.options.keywords import keywords_checked
from gtp_fx.options.options import DEFAULTS, HELP, Options
from gtp_fx.options.schedule import Schedule
from gtp_fx.passes.order import must_be_optional
from gtp_fx.strategies import Auto, Strategy
from gtp_fx.targets import Target


@keywords_checked
def optimize(
    model: nn.Module,
    *,
    flops_budget: float | None = DEFAULTS["flops_budget"],
    latency_budget: float | str | None = DEFAULTS["latency_budget"],
    batch: int = DEFAULTS["batch"],
    schedule: str | Path | Schedule | Sequence[int] = DEFAULTS["schedule"],
    strategy: str | Strategy | Auto = DEFAULTS["strategy"],
    target: str | Target = DEFAULTS["target"],
    example_inputs: Any = None,
    disabled_passes: Sequence[str] = DEFAULTS["disabled_passes"],
    dump_graphs: str | None = DEFAULTS["dump_graphs"],
    calibration: Any = DEFAULTS["calibration"],
    prefix_tokens: int | None = DEFAULTS["prefix_tokens"],
    mode: str | None = DEFAULTS["mode"],
    shapes: str = DEFAULTS["shapes"],
    output: str = DEFAULTS["output"],
    compile: bool = True,
    recapture: bool = False,
    taps: Sequence[str] = (),
    sizes: str = "given",
) -> OptimizedModel:
    """Make a faster replacement for a vision transformer, over the same parameters.

    model: what torch.compile returned stands for the module inside.
    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, of the size that the model will be
        called with; None derives them from timm's `pretrained_cfg` or HF's `config`, of the model or of the one
        inside that it passes its arguments on to. The result takes any batch. A list has several such examples: each
        size gets a graph and a schedule, over the same parameters.
    compile: let Inductor compile the graph at its first call; False gives an eager FX module.
    recapture: make a new graph where the model was changed in a way that the graph doesn't follow (a flag that forward
        reads, a block replaced); False raises InputError at the next call.
    taps: paths of modules ("blocks.5") whose outputs are wanted, too: `fast.with_taps(x)` returns them, with removed
        tokens put back, and forward hooks on those modules fire.
    sizes: "given" takes the examples' image sizes alone and raises InputError for another; "any" makes a graph and a
        schedule for a new size at its first call, and keeps the eight of these that were called last.
    The others are the fields of `gtp_fx.options.options.Options`:

    {options}

    `model` is not changed. Raises a `GtpError` (a ValueError): OptionError for a bad value, CaptureError where the
    graph can't be captured, UnsupportedModelError where no token can be removed, BudgetError where no schedule meets
    the budget, ScheduleError where a schedule doesn't fit the model, InternalError for a fault of gtp_fx itself.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(_no_module(model))
    model = without_compiling(model)
    if isinstance(model, OptimizedModel):
        raise OptionError(
            f"this {type(model).__name__} is optimised already, to {model.report.flops_ratio:.3f} of its FLOPs: "
            f"optimize the original, with the budget that you want in total"
        )
    if mode is not None and not compile:
        raise OptionError(
            f"mode={mode!r} is how to compile, and compile=False compiles nothing: leave one of them out "
            f"(torch.compile(fast, mode={mode!r}) compiles what this returns)"
        )
    options = Options.of(
        flops_budget=flops_budget,
        latency_budget=latency_budget,
        batch=batch,
        schedule=schedule,
        strategy=strategy,
        target=target,
        disabled_passes=disabled_passes,
        dump_graphs=dump_graphs,
        calibration=calibration,
        prefix_tokens=prefix_tokens,
        mode=mode,
        shapes=shapes,
        output=output,
    )
    must_be_optional(options.disabled_passes)
    any_size, tapped = checked_sizes(sizes), check_taps(model, taps)
    with internal_errors_reported():
        first, *others = call_signatures(model, example_inputs)
        must_be_calibrated_for(options, (first, *others), any_size)
        return OptimizedModel(
            model, first, options, compile, recapture=recapture, taps=tapped, others=others, any_size=any_size
        )


def _no_module(model: Any) -> str:
    """Return the message for what is given in place of a module: a function, a partial, a name."""
    if isinstance(model, torch.export.ExportedProgram):
        return "an ExportedProgram is no nn.Module; its .module() is one, but export the model after it is optimised"
    if callable(model):
        name = getattr(model, "__name__", type(model).__name__)
        return (
            f"model is the function {name!r}, and no nn.Module: give the module that it calls, or write a module "
            f"whose forward calls it; torch.compile(function, backend='gtp', options=…) takes functions"
        )
    return f"model={model!r} is no nn.Module; give a model such as timm.create_model('deit_small_patch16_224')"


def _described() -> str:
    """Return every option but the backend's own with its help text, indented for the docstring of `optimize`."""
    indent = " " * 8
    lines = (f"{name}: {text[0].lower()}{text[1:]}" for name, text in HELP.items() if name != "strict")
    return "\n    ".join(textwrap.fill(line, 112, subsequent_indent=indent) for line in lines)


optimize.__doc__ = (optimize.__doc__ or "").replace("{options}", _described())
