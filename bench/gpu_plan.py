"""Stages of `bench.gpu_quarter` on one GPU, the most useful first. Imports no torch.

A stage's name says what it does; `bench.gpu_stages` parses it:

    environment                  versions, and the rates of a copy and of a large product
    checks-WHAT                  kernels checked, at the nets' sizes in bfloat16, or at others in one dtype
    kernels-WHAT                 kernels alone, against their alternatives
    model-NET-BATCH              original and optimised, compiled and interleaved; at a large batch by operator, too
    full-NET-BATCH               the same, with every original that has to run before one is called the best
    ablate-NET-VARIANT-…         the optimised model against variants of it
    sweep-NET                    one block of the original over counts of tokens
    plain-NET-BATCH              a model without kernels, for use where a kernel is wrong
    tiles-WHAT                   other tiles of a kernel
    options-NET-BATCH-OPTION     a model with and without an option of Inductor
    sanitize-KERNEL-TOOL         a wrong kernel under compute-sanitizer
    warps-KERNEL                 a wrong kernel with fewer warps

Nets are keys of `bench.gpu_models.SUBJECTS`: S and B are DeiT-S and DeiT-B at 224, L is ViT-L at 384, D is DINOv2-B at
518, and T is a toy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_turns import Stage
from bench.inductor_candidates import CANDIDATES

SIZES = (("S", 256), ("B", 256), ("L", 64), ("D", 32))
"""Each net at its most informative batch."""
VARIANTS = {
    "B": ("regeneration", "spatial", "nokernels", "border", "all"),
    "D": ("regeneration", "spatial", "nokernels", "border", "all", "toldmask", "toldkernel", "toldchannel"),
}
"""Variants in `bench.gpu_contenders.VARIANTS` to run on each net. Token scales cost most where attention does."""
OPTIONS = {"_".join(name.replace(",", "").split()): more for name, more in CANDIDATES["h100"].items()}
"""Options of Inductor, by names that can be part of a file's name."""
_FOR_BATCH_1 = "dependent_launch"
TOOLS = ("memcheck", "racecheck")
KERNELS = ("attend", "attention_scores", "token_graph", "select", "propagate", "recover")
GOALS = {"S": 1.30, "B": 1.30, "L": 1.33, "D": 1.33, "T": 1.0}
"""Speed-up to reach by each net at its large batch. At batch 1, the goal is 1 for any net."""
TILED = ("197", "577", "1370", "propagate")


@dataclass(frozen=True)
class Limits:
    """Time limits of a stage, in seconds.

    turn: longest turn.
    least: least remaining time with which its turn begins.
    prepare: longest preparation, or longest run where it waits for no turn.
    waits: whether it waits for a turn.
    """

    turn: float
    least: float
    prepare: float
    waits: bool = True


_LIMITS = {
    "environment": Limits(15, 3, 60),
    "checks": Limits(0, 15, 150, waits=False),
    "kernels": Limits(25, 6, 170),
    "model": Limits(40, 8, 280),
    "full": Limits(50, 12, 280),
    "ablate": Limits(15, 4, 250),
    "sweep": Limits(30, 8, 120),
    "plain": Limits(40, 8, 250),
    "tiles": Limits(20, 5, 150),
    "options": Limits(30, 6, 280),
    "sanitize": Limits(0, 20, 180, waits=False),
    "warps": Limits(0, 15, 120, waits=False),
}
_SINGLE = Limits(20, 4, 280)
"""Limits of a model at batch 1, which compiles in two modes and has short runs."""
_DRY = 20
"""Factor on all limits in a dry run, which uses Triton's interpreter on one core."""


@dataclass(frozen=True)
class Plan:
    """Stages of one command.

    rounds: stages by round. Stages of a later round use results of earlier ones.
    seconds: time limit of all rounds.
    settle: seconds after which turns begin, even if some stages aren't ready.
    """

    rounds: tuple[tuple[str, ...], ...]
    seconds: float
    settle: float

    @property
    def names(self) -> list[str]:
        return [name for names in self.rounds for name in names]


def first(dry: bool) -> Plan:
    """Return the plan of the first command."""
    if dry:
        nets = ("model-T-2", "kernels-attention", "kernels-sites", "model-T-1", "ablate-T-border", "sweep-T")
        return Plan((("environment", "checks-nets", *nets),), 430 * _DRY, 110 * _DRY)
    started = {"L": 0, "D": 1, "B": 2, "S": 3}  # start the longest compilation first
    large = sorted((f"model-{net}-{batch}" for net, batch in SIZES), key=lambda name: started[name.split("-")[1]])
    single = [f"model-{net}-1" for net, _ in SIZES]
    ablations = tuple(f"ablate-{net}-{variant}" for net, variants in VARIANTS.items() for variant in variants)
    names = (*large, "environment", "checks-nets", "kernels-attention", "kernels-sites", *single, *ablations)
    others = tuple(f"checks-{dtype}" for dtype in ("bfloat16", "float16", "float32"))
    return Plan(((*names, "sweep-B", "sweep-L", *others),), 430, 110)


def sanitize(kernel: str, dry: bool) -> Plan:
    """Return the plan for a wrong kernel: its memory accesses, its result with fewer warps, models without kernels."""
    nets: Iterable[tuple[str, int]] = [("T", 2)] if dry else SIZES
    names = [*(f"sanitize-{kernel}-{tool}" for tool in TOOLS), f"warps-{kernel}"]
    names += [f"plain-{net}-{batch}" for net, batch in nets]
    return Plan((tuple(names),), *_time(dry))


def tiles(dry: bool) -> Plan:
    """Return the plan for kernels that miss the goal: other tiles, then models with the best of them."""
    later = ("model-T-2",) if dry else ("model-B-256", "model-D-32")
    return Plan((tuple(f"tiles-{what}" for what in TILED), later), *_time(dry))


def options(dry: bool) -> Plan:
    """Return the plan for a goal that is met or nearly met: Inductor's options, and other batches."""
    if dry:
        return Plan((("full-T-2", "options-T-2-coordinate_descent", f"options-T-1-{_FOR_BATCH_1}"),), *_time(dry))
    large = [f"options-B-256-{option}" for option in OPTIONS if option != _FOR_BATCH_1]
    single = [f"options-{net}-1-{_FOR_BATCH_1}" for net in "BS"]
    batches = [f"model-{net}-{batch}" for net in "SB" for batch in (64, 8)]
    return Plan((("full-B-256", *large, *single, *batches),), *_time(dry))


def _time(dry: bool) -> tuple[float, float]:
    """Return the second command's time limit and settling time, in seconds."""
    return (300 * _DRY, 80 * _DRY) if dry else (300, 80)


def stages(names: Sequence[str], folder: Path, dry: bool) -> list[Stage]:
    """Return the stages as commands of this Python, which share `folder`."""
    found = []
    for name in names:
        what, *rest = name.split("-")
        limits = _SINGLE if what == "model" and rest[-1] == "1" else _LIMITS[what]
        times = _DRY if dry else 1
        command = [sys.executable, "-m", "bench.gpu_stages", name, "--folder", str(folder), "--in-turn"]
        command += ["--dry-run"] if dry else []
        found.append(
            Stage(name, tuple(command), limits.turn * times, limits.least, limits.prepare * times, waits=limits.waits)
        )
    return found


def environment(folder: Path, processes: int, cores: int, dry: bool) -> dict[str, str]:
    """Return the environment variables of all stages: shared caches of compiled code, and of tiles measured here."""
    caches = folder / "caches"
    found = {
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "GTP_FX_CACHE": str(caches / "gtp_fx"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        # This cache's key doesn't include the preferred attention kernel, and some contenders differ in nothing else.
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, 2 * cores // processes)),
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
    }
    return {**found, "TRITON_INTERPRET": "1"} if dry else found
