"""Rows measured in processes of their own, so that a crash of one class, or a class without end, ends no other row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from bench.wild_models import every
from bench.wild_row import Row, measure

SECONDS = 300.0
"""Limit of one row, of wall time."""
ROWS_A_PROCESS = 25
"""Then a fresh process goes on: what Dynamo and the libraries keep grows with each row."""


def numbered(number: int) -> Row:
    """Measure entry `number` of all; called in a worker, which a number is sent to because builders don't pickle."""
    return measure(every()[number])


@dataclass
class _Worker:
    """A process and this end of the pipe to it.

    number: the entry that it measures. deadline: when it is given up, by time.monotonic. rows: how many it has begun.
    """

    process: Any
    pipe: Connection
    number: int = -1
    deadline: float = 0.0
    rows: int = 0

    def give(self, number: int, limit: float) -> None:
        """Let the process measure an entry."""
        self.number, self.deadline, self.rows = number, time.monotonic() + limit, self.rows + 1
        self.pipe.send(number)

    def end(self) -> None:
        """End the process, by closing the pipe where it listens, else by force."""
        self.pipe.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def measured(
    numbers: Sequence[int], jobs: int = 1, limit: float = SECONDS, work: Callable[[int], Row] = numbered
) -> Iterator[Row]:
    """Yield the rows of these entries of `every()`, each when it is known.

    jobs: processes at a time. limit: seconds until a row is given up. work: what is called with each number, there.
    """
    left, workers = list(reversed(numbers)), []
    try:
        while left or workers:
            while left and len(workers) < jobs:
                workers.append(_started(work))
                workers[-1].give(left.pop(), limit)
            soonest = min(worker.deadline for worker in workers)
            ready = wait([worker.pipe for worker in workers], timeout=max(0.0, soonest - time.monotonic()))
            now = time.monotonic()
            for worker in [w for w in workers if w.pipe in ready or w.deadline <= now]:
                row = _answer(worker) if worker.pipe in ready else _crash(worker, f"no answer within {limit:.0f} s")
                yield row
                if left and worker.pipe in ready and worker.rows < ROWS_A_PROCESS and worker.process.is_alive():
                    worker.give(left.pop(), limit)
                else:
                    workers.remove(worker)
                    worker.end()
    finally:
        for worker in workers:
            worker.process.kill()


def _started(work: Callable[[int], Row]) -> _Worker:
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, work), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _answer(worker: _Worker) -> Row:
    try:
        row: Row = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        return _crash(worker, f"the process ended with status {worker.process.exitcode}")
    return row


def _crash(worker: _Worker, message: str) -> Row:
    if worker.process.is_alive():
        worker.process.kill()
    entry = every()[worker.number]
    return Row(entry.library, entry.name, "CRASH", message)


def _serve(pipe: Connection, work: Callable[[int], Row]) -> None:
    """Measure what the pipe asks for until it is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        pipe.send(work(number))
