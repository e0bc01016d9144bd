"""What an evaluation found, as values: a row for each optimised model, which print as tables and are kept as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gtp_fx.errors import OptionError
from gtp_fx.measure.evaluation import tables
from gtp_fx.measure.evaluation.found import Outputs, Sums
from gtp_fx.measure.evaluation.intervals import Estimate
from gtp_fx.measure.evaluation.rows import About, Row
from gtp_fx.measure.evaluation.subject import weights_of
from gtp_fx.model.optimized_model import OptimizedModel

FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """An original and optimised models of it on some images. Prints as tables of at most 80 columns.

    about: what was evaluated, on what.
    rows: the optimised models.
    """

    about: About
    rows: tuple[Row, ...]

    @property
    def original(self) -> Sums | None:
        """What was found of the original, with any of the rows; None where none has been evaluated."""
        return next((row.sums for row in self.rows if row.sums is not None), None)

    def row(self, name: str) -> Row:
        """Return a row by its name. Raises OptionError where there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise OptionError(f"row {name!r} is none of {', '.join(row.name for row in self.rows)}")

    def row_of(self, fast: OptimizedModel) -> Row:
        """Return the row of an optimised model: of its weights, its strategy and its schedule.

        Raises OptionError where there is none.
        """
        if weights_of(fast) != self.about.run["weights"]:
            raise OptionError("evaluation= is of other weights: evaluate the model that is saved")
        schedule = tuple(fast.schedule)
        for row in self.rows:
            if row.sums is not None and (row.strategy, row.schedule) == (str(fast.strategy), schedule):
                return row
        raise OptionError(
            f"evaluation= has no row of this model ({fast.strategy}, {list(schedule)}), but of "
            f"{', '.join(row.name for row in self.rows)}: evaluate it, gtp_fx.evaluate(…, optimised={{'name': fast}})"
        )

    def __str__(self) -> str:
        return tables.text(self.about, self.rows)

    def markdown(self) -> str:
        """Return the tables in Markdown."""
        return tables.markdown(self.about, self.rows)

    def model_card(self, fast: OptimizedModel) -> str:
        """Return a section for the model card of one of the rows' models, in Markdown.

        Raises OptionError where none of the rows is that model's.
        """
        row = self.row_of(fast)
        told = f"This model is the row {row.name}: {row.strategy}, {row.flops_ratio:.4f} of the original's FLOPs."
        return f"## Evaluation\n\n{told}\n\n{self.markdown()}\n"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict, with the estimates and their 95 % intervals, as shares."""
        rows = [{**asdict(row), "estimates": _estimates(row, self.about)} for row in self.rows]
        return dict(_finite({"about": {**asdict(self.about), "outputs": self.about.outputs.value}, "rows": rows}))

    def plot(self, file: str | Path) -> None:
        """Draw accuracy against time; where there are none, agreement or cosine, and FLOPs.

        Raises OptionError where matplotlib isn't installed, can't write such a file, or nothing was evaluated.
        """
        from gtp_fx.measure.evaluation.draw import draw

        draw(self.about, self.rows, Path(file))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Return what `to_dict` has made a dict of."""
        known = {field.name for field in fields(Row)}
        rows = [{name: value for name, value in row.items() if name in known} for row in values["rows"]]
        about = About(**{**values["about"], "outputs": Outputs(values["about"]["outputs"])})
        return cls(about, tuple(map(Row.from_dict, rows)))

    @classmethod
    def read(cls, file: Path) -> Evaluation | None:
        """Return the evaluation in a JSON file; None where there is no file. Raises OptionError for another file."""
        try:
            return cls.from_dict(json.loads(file.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise OptionError(
                f"{file} holds no evaluation ({error}): give another folder for the results, or "
                f"overwrite=True (--overwrite) to replace it"
            ) from error


def _estimates(row: Row, about: About) -> dict[str, Any]:
    """Return a row's estimates by name, as far as they are defined."""
    if row.sums is None:
        return {}
    found: dict[str, Estimate] = {"divergence": row.sums.mean_divergence, "cosine": row.sums.mean_cosine}
    if about.outputs is Outputs.classes:
        found["agreement"] = row.sums.agreement
    if not about.unlabelled:
        (found["top1"], found["top5"]), found["top1_change"] = row.sums.optimised, row.sums.gained
        found["original_top1"], found["original_top5"] = row.sums.original
    return {name: asdict(estimate) for name, estimate in found.items()}


def _finite(value: Any) -> Any:
    """Return a value in which what is no number is None, as JSON has it."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
