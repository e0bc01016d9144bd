"""A quarter of an hour on one GPU, in two commands: are the kernels right, is the goal met, which operator takes the
time, and what would help?

    python3 -m bench.gpu_quarter first --out DIR
    python3 -m bench.gpu_quarter second --out DIR --sanitize KERNEL | --tiles | --options

It runs from a checkout with only torch, triton, timm, transformers, typer, tabulate and tqdm installed. bench/NOTES.md
says how to read the results, and `bench.gpu_plan` what runs. Files are rewritten whenever a stage is done, and nothing
runs longer than `--seconds`. On a CPU, `--dry-run` runs every stage on toy sizes with Triton's interpreter; its figures
mean nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from bench import gpu_plan
from bench.gpu_answers import answers, wrong_checks
from bench.gpu_plan import Plan
from bench.gpu_rounds import run_stages
from bench.gpu_turns import FOLDERS, Outcome, write_whole

MOST_BYTES = 16 * 2**20
"""Largest size of a result file, which has to be copied from the GPU's machine."""
_LOG_TOLD = 200_000
"""Number of last bytes of a stage's log that are kept."""
FILES = {
    "kernels.json": ("environment", "checks", "kernels", "tiles", "sanitize", "warps"),
    "models.json": ("model", "full", "plain", "options"),
    "ablations.json": ("ablate", "sweep"),
}
"""Kinds of stages whose results are in each file. log.txt, code.tar.gz and traces.tar.gz are written too."""
_MOST_TO_SETTLE = 0.3
"""Largest share of the time after which turns begin, even if some stages aren't ready."""

app = typer.Typer(add_completion=False, help="A quarter of an hour on one GPU, in two commands.")
Out = Annotated[Path, typer.Option(help="A folder for six files, at most 16 MiB each.")]
Seconds = Annotated[float | None, typer.Option(help="Nothing goes on for longer; 430 first, 300 second.")]
Processes = Annotated[int | None, typer.Option(help="Stages that get ready side by side; 8, or one a core.")]
Folder = Annotated[Path | None, typer.Option(help="For caches, which the second command finds again.")]
Commit = Annotated[str, typer.Option(help="Of what runs, where the checkout isn't git's.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Every stage on the CPU, on toy sizes.")]


@dataclass
class Quarter:
    """Run of one command.

    command: "first" or "second".
    out: folder for the results.
    folder: working folder of the stages.
    dry: whether it is a dry run.
    commit: commit that runs, where the checkout isn't git's.
    began: time at the start, in seconds.
    outcomes: outcomes of the stages so far.
    """

    command: str
    out: Path
    folder: Path
    dry: bool
    commit: str
    began: float = field(default_factory=time.monotonic)
    outcomes: list[Outcome] = field(default_factory=list)

    def run(self, plan: Plan, seconds: float, processes: int, cores: int) -> None:
        """Run the plan's rounds one after the other, each within the remaining time."""
        environment = gpu_plan.environment(self.folder, processes, cores, self.dry)
        environment["GTP_FX_COMMIT"] = self.commit
        for names in plan.rounds:
            left = max(0.0, seconds - (time.monotonic() - self.began))
            run_stages(
                gpu_plan.stages(names, self.folder, self.dry),
                self.folder,
                seconds=left,
                settle=min(plan.settle, _MOST_TO_SETTLE * left),
                processes=processes,
                environment=environment,
                done=self.note,
            )

    def note(self, outcome: Outcome) -> None:
        """Record a stage's outcome and rewrite the result files."""
        self.outcomes.append(outcome)
        typer.echo(self._line(outcome), err=True)
        self.keep()

    def _line(self, outcome: Outcome) -> str:
        ready, turn = outcome.seconds
        passed = time.monotonic() - self.began
        spent = f"{ready:.0f} s to get ready, {turn:.0f} s of its turn"
        return f"{passed:5.0f} s  {outcome.stage}: {outcome.trouble or 'done'} ({spent})"

    def found(self) -> dict[str, Any]:
        """Return the stages' results by name, including partial results of stopped stages."""
        return {file.stem: json.loads(file.read_text()) for file in sorted((self.folder / "found").glob("*.json"))}

    def keep(self) -> None:
        """Write the JSON files and the log."""
        found = self.found()
        head = {
            "bench": "gpu_quarter",
            "command": self.command,
            "dry_run": self.dry,
            "environment": found.get("environment"),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }
        for name, kinds in FILES.items():
            parts = {stage: part for stage, part in found.items() if stage.split("-")[0] in kinds}
            if parts:
                write_whole(self.out / name, json.dumps({**head, "found": parts}, indent=1) + "\n")
        log = [self._line(outcome) for outcome in self.outcomes]
        for file in sorted((self.folder / "logs").glob("*.txt")):
            log += [f"\n==== {file.stem}", file.read_bytes()[-_LOG_TOLD:].decode(errors="replace")]
        write_whole(self.out / "log.txt", "\n".join(log)[-MOST_BYTES // 2 :])

    def pack(self) -> list[str]:
        """Write archives of the generated code and of one net's timelines. Return the names of those too large."""
        code = sorted((self.folder / "code").glob("*/*.py"))
        timelines = sorted((self.folder / "traces").glob("*.json.gz"))
        chosen = [file for file in timelines if file.name.startswith("B-256")] or timelines
        packed = (("code.tar.gz", code), ("traces.tar.gz", chosen[:2]))
        return [name for name, files in packed if files and not _pack(files, self.folder, self.out / name)]


def _pack(files: Sequence[Path], root: Path, archive: Path) -> bool:
    """Write an archive, and delete it if it is too large. Return whether it was kept."""
    with tarfile.open(archive, "w:gz") as tar:
        for file in files:
            tar.add(file, arcname=str(file.relative_to(root)))
    if archive.stat().st_size > MOST_BYTES:
        archive.unlink()
        return False
    return True


@app.command()
def first(
    out: Out,
    seconds: Seconds = None,
    processes: Processes = None,
    folder: Folder = None,
    commit: Commit = "",
    dry_run: DryRun = False,
) -> None:
    """Check and time kernels; time models at a large batch and at batch 1, by operator, and with single changes."""
    _run("first", gpu_plan.first(dry_run), out, seconds, processes, folder, commit, dry_run)


@app.command()
def second(
    out: Out,
    sanitize: Annotated[str | None, typer.Option(help="A kernel that is wrong: attend, select, …")] = None,
    tiles: Annotated[bool, typer.Option("--tiles", help="Other tiles, then models with the best.")] = False,
    options: Annotated[bool, typer.Option("--options", help="Inductor's options, and other batches.")] = False,
    seconds: Seconds = None,
    processes: Processes = None,
    folder: Folder = None,
    commit: Commit = "",
    dry_run: DryRun = False,
) -> None:
    """Follow up on the first command's answers: give one of --sanitize KERNEL, --tiles and --options."""
    asked = [sanitize is not None, tiles, options]
    if sum(asked) != 1:
        _fail("second: give one of --sanitize KERNEL, --tiles and --options")
    if sanitize is not None:
        if sanitize not in gpu_plan.KERNELS:
            _fail(f"--sanitize {sanitize}: give {', '.join(gpu_plan.KERNELS)}")
        plan = gpu_plan.sanitize(sanitize, dry_run)
    else:
        plan = gpu_plan.tiles(dry_run) if tiles else gpu_plan.options(dry_run)
    _run("second", plan, out, seconds, processes, folder, commit, dry_run)


def _run(
    command: str,
    plan: Plan,
    out: Path,
    seconds: float | None,
    processes: int | None,
    folder: Path | None,
    commit: str,
    dry: bool,
) -> None:
    if not dry and not _gpus():
        _fail("no NVIDIA GPU here; --dry-run needs none")
    cores = len(os.sched_getaffinity(0))
    folder = (folder or Path(tempfile.gettempdir()) / f"gtp_fx_quarter{'_dry' if dry else ''}").resolve()
    for name in (*FOLDERS, "code", "traces"):  # remove an earlier command's
        shutil.rmtree(folder / name, ignore_errors=True)
    signal.signal(signal.SIGTERM, _interrupted)
    quarter = Quarter(command, out, folder, dry, commit)
    try:
        quarter.run(plan, plan.seconds if seconds is None else seconds, processes or min(8, cores), cores)
    finally:
        quarter.keep()
        too_large = quarter.pack()
    found = quarter.found()
    if too_large:
        typer.echo(f"not kept, too large: {', '.join(too_large)}")
    for line in answers(found, quarter.outcomes):
        typer.echo(line)
    if dry:
        typer.echo("a dry run: no figure means anything")
    if wrong_checks(found) or any(outcome.failed for outcome in quarter.outcomes):
        raise typer.Exit(1)


def _gpus() -> int:
    """Return the number of GPUs, from the driver, since importing torch takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(why: str) -> NoReturn:
    typer.echo(f"gpu_quarter: {why}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
