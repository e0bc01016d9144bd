"""Runner of stages: they prepare in parallel, then take turns on the GPU, within a time limit (see
`bench.gpu_turns`)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu_turns import FOLDERS, LEFT_OUT, POLL, Outcome, Stage, write_whole


@dataclass
class _Run:
    """A stage's process.

    stage: the stage.
    process: its process, which leads a process group.
    active: seconds in which it wasn't halted, since its start or since its turn began.
    prepared: seconds of preparation, without those in which it was halted.
    halted: whether it is halted.
    """

    stage: Stage
    process: subprocess.Popen[bytes]
    active: float = 0.0
    prepared: float = 0.0
    halted: bool = False

    def send(self, what: signal.Signals) -> None:
        """Send a signal to the stage and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, what)

    def halt(self, halted: bool) -> None:
        if halted != self.halted:
            self.send(signal.SIGSTOP if halted else signal.SIGCONT)
            self.halted = halted


@dataclass
class _Round:
    """State of `run_stages`.

    folder: working folder of the stages.
    deadline: time at which all have to end, in seconds.
    pending: stages not started yet.
    done: called with each outcome.
    environment: environment variables of the stages, besides this process's.
    running: processes that prepare, wait or have their turn.
    turn: the process that has its turn.
    outcomes: outcomes so far.
    """

    folder: Path
    deadline: float
    pending: list[Stage]
    done: Callable[[Outcome], object]
    environment: Mapping[str, str]
    running: list[_Run] = field(default_factory=list)
    turn: _Run | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def file(self, folder: str, stage: Stage, end: str) -> Path:
        return self.folder / folder / f"{stage.name}.{end}"

    def ready(self) -> list[_Run]:
        return [run for run in self.running if self.file("turns", run.stage, "ready").exists() and run is not self.turn]

    def preparing(self) -> list[_Run]:
        ready = self.ready()
        return [run for run in self.running if run not in ready and run is not self.turn]

    def start(self, stage: Stage) -> None:
        with self.file("logs", stage, "txt").open("wb") as log:
            environment = {**os.environ, **self.environment}
            process = subprocess.Popen(
                stage.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.running.append(_Run(stage, process))

    def finish(self, run: _Run, trouble: str) -> None:
        """Kill a stage's remaining processes and record its outcome."""
        run.send(signal.SIGKILL)
        run.process.wait()
        self.running.remove(run)
        seconds = (run.prepared, run.active) if run is self.turn else (run.active, 0.0)
        if run is self.turn:
            self.turn = None
        self.record(Outcome(run.stage.name, trouble, seconds))

    def record(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.done(outcome)

    def trouble_of(self, run: _Run, code: int) -> str:
        if code == 0:
            return ""
        lines = self.file("logs", run.stage, "txt").read_text(errors="replace").strip().splitlines()
        how = f"ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        return f"{how}{': ' + lines[-1][-300:] if lines else ''}"


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    *,
    seconds: float,
    settle: float,
    processes: int,
    environment: Mapping[str, str] | None = None,
    done: Callable[[Outcome], object] = lambda outcome: None,
) -> list[Outcome]:
    """Run the stages that fit into `seconds`, in order, and return the outcome of each.

    folder: working folder of the stages.
    seconds: time limit.
    settle: seconds after which turns begin, or earlier once every stage is ready. Afterwards, a stage has its turn as
        soon as it is ready and no other has one.
    processes: stages that prepare at a time.
    environment: environment variables of the stages, besides this process's.
    done: called with each outcome.
    """
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for stage in stages:
        for file in folder.glob(f"*/{stage.name}.*"):
            file.unlink()
    start = time.monotonic()
    now = _Round(folder, start + seconds, list(stages), done, environment or {})
    try:
        before = start
        while now.running or now.pending:
            passed, before = time.monotonic() - before, time.monotonic()
            _look(now, passed)
            if now.left <= 0:
                break
            if now.turn is None:
                _begin(now, processes)
                settled = before - start >= settle or not (now.pending or now.preparing())
                if settled:
                    _give_turn(now)
            time.sleep(POLL)
    finally:  # the time is over, or the run is interrupted
        for run in list(now.running):
            waited = run in now.ready()
            got = f"{LEFT_OUT}: {'its turn had not come' if waited else 'it was not ready'} when time was over"
            now.finish(run, "stopped in its turn when time was over" if run is now.turn else got)
        for stage in now.pending:
            now.record(Outcome(stage.name, f"{LEFT_OUT}: time was over", (0.0, 0.0)))
    return now.outcomes


def _look(now: _Round, passed: float) -> None:
    """Finish the processes that ended or exceeded their limits, and resume halted ones where nobody has a turn."""
    waiting = now.ready()
    for run in list(now.running):
        if not run.halted and run not in waiting:
            run.active += passed
        code = run.process.poll()
        if code is not None:
            now.finish(run, now.trouble_of(run, code))
        elif run is now.turn and run.active > run.stage.limit:
            now.finish(run, f"stopped: its turn had {run.stage.limit:g} s")
        elif run is not now.turn and run not in waiting and run.active > run.stage.prepare:
            what = "ready" if run.stage.waits else "done"
            now.finish(run, f"stopped: not {what} within {run.stage.prepare:g} s")
    if now.turn is None:
        for run in now.running:
            run.halt(False)


def _begin(now: _Round, processes: int) -> None:
    """Start pending stages while fewer than `processes` prepare, and skip those without enough time."""
    while now.pending and len(now.preparing()) < processes:
        stage = now.pending.pop(0)
        if now.left < stage.least:
            now.record(
                Outcome(stage.name, f"{LEFT_OUT}: {now.left:.0f} s were left, it takes {stage.least:g}", (0.0, 0.0))
            )
        else:
            now.start(stage)


def _give_turn(now: _Round) -> None:
    """Give the turn to the first ready stage with enough time, and halt those that prepare."""
    order = [run for run in now.ready() if run.process.poll() is None]
    for run in order:
        if now.left < run.stage.least:
            now.finish(run, f"{LEFT_OUT}: {now.left:.0f} s were left for its turn, it takes {run.stage.least:g}")
            continue
        now.turn = run
        run.prepared, run.active = run.active, 0.0
        for other in now.preparing():
            other.halt(True)
        write_whole(now.file("turns", run.stage, "go"), f"{0.9 * min(run.stage.limit, now.left):.1f}")
        return
