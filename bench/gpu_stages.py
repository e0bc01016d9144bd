"""One stage of `bench.gpu_quarter`, in a process of its own. It can also be run by hand, from a checkout:

    python -m bench.gpu_stages model-B-64 --folder /tmp/quarter

`bench.gpu_plan` lists the names. Results go to FOLDER/found/NAME.json, generated code to FOLDER/code, and timelines to
FOLDER/traces.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
import typer

from bench import gpu_checks, gpu_kernels, gpu_models, gpu_sweep, gpu_tiles, gpu_wrong
from bench.gpu_check import Check
from bench.gpu_contenders import BASELINES, MODES, Contender
from bench.gpu_environment import environment
from bench.gpu_plan import SIZES
from bench.gpu_turns import Turn
from gtp_fx.kernels.available import has_kernels, load_kernels
from gtp_fx.measure import site_probes
from gtp_fx.targets import detect

_ROUNDS, _SINGLE_ROUNDS, _FEW_ROUNDS = 15, 60, 9
"""Rounds of timing at a large batch, at batch 1, where calls are short, and in a sweep over many counts."""


@dataclass(frozen=True)
class Place:
    """Context in which a stage runs.

    folder: working folder of the stages.
    turn: the stage's turn.
    device: the GPU, or the CPU in a dry run.
    dtype: dtype of models and operands.
    dry: whether to run toy sizes on the CPU in Triton's interpreter.
    """

    folder: Path
    turn: Turn
    device: torch.device
    dtype: torch.dtype
    dry: bool

    def rounds(self, wanted: int) -> int:
        return 2 if self.dry else wanted


def main(
    name: Annotated[str, typer.Argument(help="What to do, as bench.gpu_plan names it.")],
    folder: Annotated[Path, typer.Option(help="For what is found, and for caches.")],
    in_turn: Annotated[bool, typer.Option("--in-turn", help="Wait to be told to begin, once ready.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="On the CPU, toy sizes.")] = False,
) -> None:
    """Run one stage of bench.gpu_quarter."""
    what, *rest = name.split("-")
    if what not in STAGES:
        _fail(f"no stage is called {name!r}; names begin with {', '.join(STAGES)}")
    device = torch.device("cpu" if dry_run else "cuda")
    if not dry_run and not (torch.cuda.is_available() and has_kernels(device)):
        _fail("no GPU that the kernels are made for (NVIDIA, Ampere or later, with Triton); --dry-run needs none")
    if dry_run:
        _interpret()
    load_kernels()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # contenders share one class's forward
    turn = Turn(folder, name, alone=not in_turn)
    place = Place(folder, turn, device, torch.float32 if dry_run else torch.bfloat16, dry_run)
    STAGES[what](place, rest)


def _interpret() -> None:
    """Run kernels in Triton's interpreter, also in the probes, which use operators on a CPU otherwise."""
    from bench.interpreter import make_loops_run

    try:
        make_loops_run()
    except RuntimeError as error:
        _fail(str(error))
    site_probes.has_kernels = lambda device: True  # type: ignore[attr-defined]


def _environment(place: Place, rest: Sequence[str]) -> None:
    place.turn.wait()
    place.turn.keep(environment(place.device, place.dtype, place.dry))


def _checks(place: Place, rest: Sequence[str]) -> None:
    """Check kernels at the nets' sizes in bfloat16, or at others in the named dtype."""
    sizes, dtypes = gpu_checks.NETS, [torch.bfloat16]
    if rest[0] != "nets":
        sizes, dtypes = gpu_checks.OTHERS, [getattr(torch, rest[0])]
    if place.dry:
        sizes, dtypes = gpu_checks.DRY, [torch.bfloat16, torch.float32]
    wanted = list(gpu_checks.cases(sizes, dtypes))
    checks: list[Check] = []
    for done, case in enumerate(wanted, 1):
        checks += case.checks(place.device)
        rows = [{**asdict(check), "right": check.right} for check in checks]
        place.turn.keep({"done": done, "wanted": len(wanted), "checks": rows})


def _kernels(place: Place, rest: Sequence[str]) -> None:
    sizes = gpu_kernels.DRY if place.dry else gpu_kernels.NETS
    asked = list(gpu_kernels.questions(rest[0], place.device, place.dtype, sizes))
    _answer(place, asked)


def _answer(place: Place, asked: Sequence[gpu_kernels.Question]) -> list[gpu_kernels.KernelRow]:
    place.turn.wait()
    rows: list[gpu_kernels.KernelRow] = []
    for question in asked:
        if place.turn.left <= 0:
            break
        rows.append(question.answer(place.device, place.rounds(_ROUNDS)))
        left_out = [[other.kernel, other.size] for other in asked[len(rows) :]]
        place.turn.keep({"rows": [asdict(row) for row in rows], "left_out": left_out})
    return rows


def _model(place: Place, rest: Sequence[str]) -> None:
    """Time a model. At batch 1 the host's time dominates, so the contenders include CUDA graphs."""
    net, batch = rest[0], int(rest[1])
    if batch > 1:
        contenders = [Contender(False), Contender(False, attention="flash"), Contender(True)]
        _compare(place, net, batch, contenders, by_operator=True)
        return
    originals = [Contender(False), Contender(False, "reduce-overhead"), Contender(False, "reduce-overhead", "flash")]
    _compare(place, net, batch, [*originals, Contender(True), Contender(True, "reduce-overhead")])


def _full(place: Place, rest: Sequence[str]) -> None:
    """Time all originals of `BASELINES`, and the optimised model in the same modes. Compiling them takes long."""
    ours = [Contender(True, mode) for mode in MODES]
    _compare(place, rest[0], int(rest[1]), [*BASELINES, *ours])


def _ablate(place: Place, rest: Sequence[str]) -> None:
    net, *variants = rest
    batch = dict(_batches(place))[net]
    _compare(place, net, batch, [Contender(True), *(Contender(True, variant=variant) for variant in variants)])


def _plain(place: Place, rest: Sequence[str]) -> None:
    contenders = [Contender(False), Contender(False, attention="flash"), Contender(True, variant="nokernels")]
    _compare(place, rest[0], int(rest[1]), contenders)


def _options(place: Place, rest: Sequence[str]) -> None:
    """Time the original and the optimised model with and without an option of Inductor."""
    net, batch, option = rest[0], int(rest[1]), rest[2]
    mode = "default" if batch > 1 else "reduce-overhead"
    contenders = [Contender(ours, mode, option=which) for ours in (False, True) for which in ("", option)]
    _compare(place, net, batch, contenders)


def _compare(place: Place, net: str, batch: int, contenders: Sequence[Contender], by_operator: bool = False) -> None:
    target, code = detect(place.device.type), place.folder / "code" / f"{net}-{batch}"
    prepared = gpu_models.prepare(net, batch, contenders, target, place.dtype, code)
    place.turn.wait()
    rounds = _ROUNDS if batch > 1 else _SINGLE_ROUNDS
    row = gpu_models.timed(prepared, place.rounds(rounds), place.turn)
    place.turn.keep(row.to_dict())
    if by_operator:
        row = gpu_models.by_operator(prepared, row, place.folder / "traces")
        place.turn.keep(row.to_dict())


def _batches(place: Place) -> Sequence[tuple[str, int]]:
    return [("T", 2)] if place.dry else SIZES


def _sweep(place: Place, rest: Sequence[str]) -> None:
    sweep = gpu_sweep.prepare(rest[0], place.device, place.dtype)
    place.turn.wait()
    row = sweep.timed(place.rounds(_FEW_ROUNDS), place.turn)
    place.turn.keep(
        {**asdict(row), "steps": {name: gpu_sweep.steps(row.tokens, taken) for name, taken in row.seconds.items()}}
    )


def _tiles(place: Place, rest: Sequence[str]) -> None:
    asked = gpu_tiles.questions(rest[0], place.device, place.dtype, place.dry)
    rows = _answer(place, asked)
    if rest[0] != "propagate":
        best = [gpu_tiles.keep_best(row, place.device, place.dtype) for row in rows]
        place.turn.keep({"rows": [asdict(row) for row in rows], "best": best})


def _sanitize(place: Place, rest: Sequence[str]) -> None:
    place.turn.keep(gpu_wrong.sanitized(rest[0], rest[1], place.folder, place.dry))


def _warps(place: Place, rest: Sequence[str]) -> None:
    place.turn.keep(gpu_wrong.by_warps(rest[0], place.folder, place.dry))


def _case(place: Place, rest: Sequence[str]) -> None:
    """Run one case of a kernel: KERNEL-PLACE or KERNEL-PLACE-WARPS."""
    if len(rest) > 2:
        gpu_wrong.relaunch(int(rest[2]))
    found = gpu_wrong.run_case(gpu_wrong.cases_of(rest[0], place.dry)[int(rest[1])], place.device)
    place.turn.keep(found)
    print(f"{rest[0]} at {found['size']} in {found['dtype']}: {'right' if found['right'] else 'WRONG'}")


def _find_failing(place: Place, rest: Sequence[str]) -> None:
    gpu_wrong.find_failing(rest[0], place.device, place.dry, place.turn)


STAGES: Mapping[str, Callable[[Place, Sequence[str]], None]] = {
    "environment": _environment,
    "checks": _checks,
    "kernels": _kernels,
    "model": _model,
    "full": _full,
    "ablate": _ablate,
    "sweep": _sweep,
    "plain": _plain,
    "tiles": _tiles,
    "options": _options,
    "sanitize": _sanitize,
    "warps": _warps,
    "case": _case,
    "failing": _find_failing,
}


def _fail(why: str) -> None:
    typer.echo(f"gpu_stages: {why}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
