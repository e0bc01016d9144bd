"""`optimize`, the door for modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gtp_fx.config import Options
from gtp_fx.errors import OptionError
from gtp_fx.inputs import call_signature
from gtp_fx.model import OptimizedModel
from gtp_fx.schedule import Schedule
from gtp_fx.strategies import Strategy
from gtp_fx.targets import Target


def optimize(
    model: nn.Module,
    *,
    flops_budget: float | None = None,
    latency_budget: float | str | None = None,
    batch: int = 8,
    schedule: str | Schedule | Sequence[int] = "auto",
    strategy: str | Strategy = "gtp",
    target: str | Target = "auto",
    example_inputs: Any = None,
    disabled_passes: Sequence[str] = (),
    dump_graphs: str | None = None,
    calibration: Any = None,
    mode: str | None = None,
    compile: bool = True,
) -> OptimizedModel:
    """A faster stand-in for a vision transformer, over the same parameters.

    flops_budget: strict upper bound on FLOPs(result) / FLOPs(original), in (0, 1], gtp_fx's own work counted. 1.0 applies
        the exact passes alone: the numbers are the original's.
    latency_budget: instead of it, an upper bound on the time that `target` is predicted to take, compiled, for `batch` images: a ratio
        of the original's predicted time, in (0, 1], or a time such as "4.5ms". Counts then suit the target's tiles. The target
        need not be this machine's; of this one, `gtp-fx tune` measures what predictions rest on.
    batch: images of a run, for predicted times alone.
    schedule: "auto" (least expected damage within the budget), "uniform" (the paper's constant count per block), "even" (the
        same to the token), a Schedule, or the number of tokens that leave at each attention block, in order. By name, a budget
        is needed.
    strategy: "gtp", or a value such as `gtp_fx.GTP(alpha=0.2, graph="spatial")`.
    target: the processor to compile for, by name; "auto" is the machine's own. What it tells Inductor was measured to
        pay there.
    example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, of the size that the model will be
        called with; found from timm's `pretrained_cfg` or HF's `config` where None. Any batch is good afterwards.
    disabled_passes: exact passes to leave out, by name ("fuse_projections"), to see what one does or to do without it. Tokens that no
        output depends on stay with ["split_projections", "drop_dead_tokens"].
    dump_graphs: a folder for the graph behind each pass; TORCH_LOGS="+gtp_fx" and TORCH_TRACE tell the same as it happens.
    calibration: some dozens of unlabelled images (a tensor, a list of batches, or a `gtp_fx.Calibration`), on which
        schedule="auto" measures what each block can do without; takes a forward pass for each of some counts at each block,
        kept in the user's cache. Without, a prior decides.
    mode: torch.compile's: "reduce-overhead" (CUDA graphs, for small batches), "max-autotune", …; wins over what the
        target tells Inductor.
    compile: let Inductor compile the graph at its first call; False gives an eager FX module.

    `model` is not changed. Raises a `GtpError` (a ValueError): OptionError for a bad value, CaptureError where the graph
    can't be had, UnsupportedModelError where no token can leave, BudgetError or ScheduleError where the model can't do
    what was asked.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"model={model!r} is no nn.Module; give a model such as timm.create_model('deit_small_patch16_224')"
        )
    if isinstance(model, OptimizedModel):
        raise OptionError(
            f"this {type(model).__name__} is optimised already, to {model.report.flops_ratio:.3f} of its FLOPs: optimize the original, with "
            f"the budget that you want in all"
        )
    if mode is not None and not compile:
        raise OptionError(
            f"mode={mode!r} is how to compile, and compile=False: leave one of them out "
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
        mode=mode,
    )
    return OptimizedModel(model, call_signature(model, example_inputs), options, compile)
