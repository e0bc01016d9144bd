"""The measuring of an evaluation's rows: models are made, compiled, timed, and run on the images."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gtp_fx.errors import GtpError, InternalError
from gtp_fx.measure.benchmark import ORIGINAL
from gtp_fx.measure.evaluation.base_outputs import BaseOutputs, folder_for
from gtp_fx.measure.evaluation.contenders import Contender
from gtp_fx.measure.evaluation.data import Data
from gtp_fx.measure.evaluation.found import Outputs, Sums
from gtp_fx.measure.evaluation.passing import evaluate_on
from gtp_fx.measure.evaluation.record import Record
from gtp_fx.measure.evaluation.rows import Row
from gtp_fx.measure.evaluation.subject import Model, Subject
from gtp_fx.measure.evaluation.times import compiled_models, steps_of_timing, times_of
from gtp_fx.model.optimize import optimize
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.options.progress import Progress, Steps
from gtp_fx.strategies.auto import chosen_by


@dataclass(frozen=True)
class How:
    """How rows are measured.

    compiled: whether models are compiled.
    timing: whether they are timed.
    rounds: of timing.
    cache: whether the original's outputs are kept.
    """

    compiled: bool
    timing: bool
    rounds: int
    cache: bool


@dataclass(eq=False)
class Session:
    """The measuring of some rows.

    subject: the original.
    data: the images.
    kind: what outputs are.
    run: what decides the result, by name.
    records: a folder for what is found on each image; None to keep nothing.
    keep: called with the rows when some of them have changed.
    """

    subject: Subject
    data: Data
    kind: Outputs
    how: How
    run: Mapping[str, object]
    records: Path | None
    keep: Callable[[Sequence[Row]], object]
    progress: Progress | None = None

    def measure(self, wanted: Sequence[Contender], known: Mapping[str, Row]) -> tuple[list[Row], int, bool]:
        """Return a row for each contender, how many images there were, and whether they had labels.

        known: rows of an earlier run, by name, in which something is missing.
        """
        made, rows = self._made(wanted, known)
        if not made:
            return list(rows.values()), self.data.images or 0, True
        models = self._models(made, rows)
        self._time(models, rows)
        self.keep(list(rows.values()))
        records = {name: self._record(rows[name]) for name in models if name != ORIGINAL}
        images, labelled, wrong = evaluate_on(
            self.data,
            models,
            records,
            self.kind,
            self._base(made, self.data.images or 0),
            self.subject.placed,
            size=len(self.data.first()) if self.how.compiled else 0,
            progress=self.progress,
        )
        for name, record in records.items():
            found = {"reason": wrong[name]} if name in wrong else {"sums": Sums.of(record.found.values())}
            rows[name] = replace(rows[name], **found)  # type: ignore[arg-type]
        return list(rows.values()), images, labelled

    def _made(
        self, wanted: Sequence[Contender], known: Mapping[str, Row]
    ) -> tuple[dict[str, OptimizedModel], dict[str, Row]]:
        """Make the models. One that can't be made is a row with the reason."""
        made, rows = {}, {}
        example = self.subject.signature
        for number, each in enumerate(wanted):
            if self.progress is not None:
                self.progress(f"optimising: {each.name}", number, len(wanted))
            try:
                fast = optimize(
                    self.subject.model,
                    example_inputs=example.kwargs if example.kwargs else example.args,
                    compile=self.how.compiled,
                    **each.options,
                )
            except InternalError:
                raise
            except GtpError as error:
                rows[each.name] = Row(each.name, each.asked, reason=str(error))
                continue
            made[each.name] = fast
            before = known.get(each.name)
            times = before.times if before is not None else None
            told = (str(fast.strategy), tuple(fast.schedule), fast.report.flops_ratio)
            chosen = chosen_by(each.options["strategy"], fast.strategy)
            rows[each.name] = Row(each.name, each.asked, *told, times=times, chosen=chosen)
        return made, rows

    def _models(self, made: Mapping[str, OptimizedModel], rows: dict[str, Row]) -> dict[str, Model]:
        """Return the original and the optimised models as they will be run; rows get the reasons of the others."""
        subject = self.subject
        eager: dict[str, Model] = {ORIGINAL: subject.called(subject.model)}
        eager |= {name: subject.called(fast.graph_module) for name, fast in made.items()}
        if not self.how.compiled:
            return eager
        inductor = next(iter(made.values())).inductor_options
        torch.compiler.reset()  # not between models, which would discard the first one's code before it is timed
        compiled = {ORIGINAL: subject.called(torch.compile(subject.model, options=inductor or None))}
        compiled |= {name: subject.called(fast) for name, fast in made.items()}
        steps = Steps(len(compiled), self.progress)
        right, wrong = compiled_models(eager, compiled, subject.placed(self.data.first()), steps)
        for name, reason in wrong.items():
            rows[name] = replace(rows[name], reason=reason)
        return right

    def _time(self, models: Mapping[str, Model], rows: dict[str, Row]) -> None:
        """Time the models that haven't been timed."""
        untimed = [name for name in models if name != ORIGINAL and rows[name].times is None]
        if not self.how.timing or not untimed:
            return
        runs = {name: models[name] for name in (ORIGINAL, *untimed)}
        steps = Steps(steps_of_timing(len(runs), self.how.rounds), self.progress)
        times = times_of(runs, self.subject.placed(self.data.first()), self.how.rounds, steps)
        for name in untimed:
            rows[name] = replace(rows[name], times=times[name])

    def _record(self, row: Row) -> Record:
        """Return what was found so far for a row. A row with another schedule has another file."""
        run = {**self.run, "strategy": row.strategy, "schedule": list(row.schedule)}
        if self.records is None:
            return Record.of(None, run)
        digest = hashlib.sha256(str(sorted(run.items())).encode()).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9.]+", "_", row.name)
        return Record.of(self.records / f"{name}_{digest}", run)

    def _base(self, made: Mapping[str, OptimizedModel], images: int) -> BaseOutputs:
        """Return the original's outputs, as far as they are kept: of this graph, weights, images and preparation."""
        if not self.how.cache or not (self.run["data"] and self.run["weights"]):
            return BaseOutputs(None, images)
        graph = next(iter(made.values())).captured_graph.code
        return BaseOutputs(folder_for(graph, self.run), images)
