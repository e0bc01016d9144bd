"""Which of Inductor's options pay on this processor? Original and optimised with and without each, in one run.

    OMP_NUM_THREADS=1 python -m bench.inductor_options --out bench/results/inductor_options_cpu_1.json

Runs are interleaved. An option pays where the optimised model is faster with it by more than 1.01, quartiles apart. The
original gets the same option, so that the speed-up over it, with and without, says whether the option is for this
compiler or for everybody. On a CPU the clock is the process's own, which other processes don't run on.

"freezing" is no option that a compilation can be given: Dynamo has to know as well, so it is set around the first
call. Weights are copied then, and don't follow `load_state_dict`: it can be measured here, and no target may have it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from tabulate import tabulate
from torch import Tensor, nn
from torch._inductor import config

import gtp_fx
from bench.environment import Environment
from bench.inductor_candidates import CANDIDATES, Patches
from bench.live_weights import enliven
from bench.output import publish
from gtp_fx.cli.arguments import Device, Dtype
from gtp_fx.cli.photo import photo_batch
from gtp_fx.errors import CheckError, GtpError, OptionError
from gtp_fx.graph.verify import rounding_tolerance
from gtp_fx.measure.compare import Compilation, compile_checked
from gtp_fx.measure.timing import Run, Spread, Timings, balanced_orders, cuda_seconds, interleave, process_seconds
from gtp_fx.options.progress import Steps, progress_bar
from gtp_fx.targets import Target, detect

PLAIN = "none"
LEAST_GAIN = 1.01
_WARMUP = 1


@dataclass(frozen=True)
class Row:
    """What one option did.

    gains: times faster with it than without, in the same round.
    speed_up: of the optimised model over the original, both with the option.
    ratio: `speed_up` over the speed-up without the option.
    first_call: seconds of the original's and the optimised model's.
    """

    option: str
    patches: Patches
    original_gain: Spread
    optimised_gain: Spread
    speed_up: Spread
    ratio: Spread
    pays: bool
    first_call: tuple[float, float]


def main(
    model: Annotated[str, typer.Option(help="timm's name.")] = "deit_small_patch16_224",
    depth: Annotated[int | None, typer.Option(help="Blocks to cut it to.")] = None,
    batch: Annotated[int, typer.Option(help="Images per run.")] = 8,
    budget: Annotated[float, typer.Option(help="FLOPs after / before at most, in (0, 1].")] = 0.74,
    option: Annotated[list[str] | None, typer.Option(help="Only these of the target's candidates.")] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    device: Annotated[Device, typer.Option()] = Device.cpu,
    rounds: Annotated[int | None, typer.Option(help="Of timing; as many as balance the order where left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Time a model and its optimised form under each of Inductor's options that are candidates on this processor."""
    target = detect(device.value)
    try:
        chosen = _candidates(target, option)
        cut: dict[str, Any] = {} if depth is None else {"depth": depth}
        net = enliven(timm.create_model(model, **cut)).eval().to(device.value, getattr(torch, dtype.value))
        images = photo_batch(net, batch)
        schedule = gtp_fx.optimize(net, flops_budget=budget, target=target, compile=False).schedule
        timings, compilations = measure(net, images, schedule, target, chosen, rounds)
    except (GtpError, CheckError) as error:
        typer.echo(f"inductor_options: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, GtpError) else 1) from error
    rows = [row(name, patches, timings, compilations) for name, patches in chosen.items()]
    here = Environment.here(device.value)
    typer.echo(f"{table(rows)}\n{timings.rounds} interleaved rounds, batch {batch}; {here}", err=True)
    result = {
        "bench": "inductor_options",
        "model": model,
        "depth": depth,
        "target": target.name,
        "dtype": dtype.value,
        "batch": batch,
        "flops_budget": budget,
        "schedule": list(schedule),
        "clock": "CPU seconds of the process" if device is Device.cpu else "seconds between events",
        "environment": asdict(here),
        "rows": [asdict(each) for each in rows],
        "compilations": {name: asdict(done) for name, done in compilations.items()},
        "seconds": timings.to_dict(),
    }
    publish(result, out)


@torch.no_grad()
def measure(
    model: nn.Module,
    images: Tensor,
    schedule: gtp_fx.Schedule,
    target: Target,
    candidates: Mapping[str, Patches],
    rounds: int | None = None,
) -> tuple[Timings, dict[str, Compilation]]:
    """Times and first calls of original and optimised model under no option and each candidate, by `contender`'s names.

    Every compiled form is held against its eager one first. Raises CheckError where one is wrong.
    """
    torch._dynamo.reset()
    runs: dict[str, Run] = {}
    compilations: dict[str, Compilation] = {}
    tolerance = rounding_tolerance(images.dtype)
    # One model's forward is compiled once for each option, past what Dynamo takes for a mistake.
    with torch._dynamo.config.patch(recompile_limit=4 * len(candidates) + 8):
        for name, patches in {PLAIN: {}, **candidates}.items():
            told = {option: value for option, value in patches.items() if option != "freezing"}
            fast = gtp_fx.optimize(model, schedule=schedule, target=replace(target, inductor=told))
            original: Any = torch.compile(model, options=patches or None)
            for what, eager, compiled in (("original", model, original), ("optimised", fast.graph_module, fast)):
                label, run = contender(what, name), functools.partial(compiled, images)
                with config.patch(freezing=patches.get("freezing", False)):
                    compilations[label] = compile_checked(label, run, eager(images), tolerance, images.device)
                typer.echo(f"{label}: compiled in {compilations[label].seconds:.0f} s", err=True)
                runs[label] = run
        clock = cuda_seconds if images.device.type == "cuda" else process_seconds
        rounds = rounds or len(balanced_orders(len(runs)))
        with progress_bar() as show:
            steps = Steps(len(runs) * (_WARMUP + rounds), show)
            steps.begin("timing")
            timings = interleave(runs, rounds=rounds, warmup=_WARMUP, clock=clock, progress=steps.done)
    return timings, compilations


def contender(what: str, option: str) -> str:
    """The name of the original or the optimised model under an option."""
    return f"{what}, {option}"


def row(option: str, patches: Patches, timings: Timings, compilations: Mapping[str, Compilation]) -> Row:
    """What an option did, from the rounds in which all ran."""
    seconds = [timings.seconds[contender(what, name)] for name in (PLAIN, option) for what in ("original", "optimised")]
    ratios = [
        (original / fast) / (plain_original / plain_fast)
        for plain_original, plain_fast, original, fast in zip(*seconds, strict=True)
    ]
    fast, plain = contender("optimised", option), contender("optimised", PLAIN)
    gain = timings.speed_up(fast, plain)
    apart = timings.spread(fast).upper < timings.spread(plain).lower
    return Row(
        option=option,
        patches=patches,
        original_gain=timings.speed_up(contender("original", option), contender("original", PLAIN)),
        optimised_gain=gain,
        speed_up=timings.speed_up(fast, contender("original", option)),
        ratio=Spread.of(ratios),
        pays=gain.median > LEAST_GAIN and apart,
        first_call=(compilations[contender("original", option)].seconds, compilations[fast].seconds),
    )


def table(rows: list[Row]) -> str:
    headers = [
        "option",
        "original, gain",
        "optimised, gain",
        "quartiles",
        "speed-up",
        "over none's",
        "quartiles",
        "pays",
    ]
    lines = [
        [
            each.option,
            f"{each.original_gain.median:.3f}×",
            f"{each.optimised_gain.median:.3f}×",
            f"{each.optimised_gain.lower:.3f} – {each.optimised_gain.upper:.3f}",
            f"{each.speed_up.median:.3f}×",
            f"{each.ratio.median:.3f}×",
            f"{each.ratio.lower:.3f} – {each.ratio.upper:.3f}",
            "yes" if each.pays else "no",
        ]
        for each in rows
    ]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", *("right",) * 7))


def _candidates(target: Target, names: list[str] | None) -> dict[str, Patches]:
    known = CANDIDATES[target.name]
    if unknown := sorted(set(names or ()) - set(known)):
        raise OptionError(f"--option {', '.join(unknown)}: {target.name} has {', '.join(known)}")
    return {name: patches for name, patches in known.items() if not names or name in names}


if __name__ == "__main__":
    typer.run(main)
