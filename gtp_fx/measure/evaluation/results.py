"""What an evaluation leaves in a folder, and finds there: evaluation.json, which goes on, a text and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gtp_fx.errors import OptionError, warn
from gtp_fx.measure.evaluation.contenders import Contender
from gtp_fx.measure.evaluation.evaluation import FILE, Evaluation
from gtp_fx.measure.evaluation.record import must_be_of
from gtp_fx.measure.evaluation.rows import About, Row, with_rows
from gtp_fx.targets.cache import keep_json

PICTURE, TEXT = "evaluation.png", "evaluation.md"


def rows_before(folder: Path, run: Mapping[str, object], overwrite: bool) -> tuple[Row, ...]:
    """Return the rows that an earlier run has left in a folder; none of an evaluation of something else to `overwrite`.

    Raises OptionError where that isn't to be overwritten, or where there are results without such rows.
    """
    try:
        return _rows_of(folder, run)
    except OptionError:
        if overwrite:
            return ()
        raise


def _rows_of(folder: Path, run: Mapping[str, object]) -> tuple[Row, ...]:
    """Return the rows of this run in a folder. Raises OptionError where something else is there."""
    file = folder / FILE
    found = Evaluation.read(file)
    if found is None:
        if others := [name for name in (TEXT, PICTURE) if (folder / name).exists()]:
            raise OptionError(
                f"{folder / others[0]} exists already, without the {FILE} that an evaluation leaves beside it: give "
                f"another folder for the results, or overwrite=True (--overwrite) to replace it"
            )
        return ()
    if not (run["data"] and run["weights"]):
        what = "data= is an iterator" if run["weights"] else "weights are quantised or sharded"
        raise OptionError(
            f"{file} is of another run, and {what}, which can't be recognised again: give another folder, or "
            f"the images as a list or a folder"
        )
    must_be_of(
        found.about.run, run, f"{file}: give another folder for the results, overwrite=True (--overwrite) to replace it"
    )
    return found.rows


def evaluation_of(about: About, before: Sequence[Row], rows: Sequence[Row], wanted: Sequence[Contender]) -> Evaluation:
    """Return an evaluation with rows, those that are wanted first and in that order."""
    order = {each.name: number for number, each in enumerate(wanted)}
    return Evaluation(about, tuple(sorted(with_rows(before, rows), key=lambda row: order.get(row.name, len(order)))))


def write(evaluation: Evaluation, folder: Path, whole: bool = True) -> None:
    """Write an evaluation into a folder. whole: also as text and picture."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_json(folder / FILE, evaluation.to_dict())
    if not whole:
        return
    (folder / TEXT).write_text(f"# {evaluation.about.model}\n\n{evaluation.markdown()}\n")
    if evaluation.original is None:
        return
    try:
        evaluation.plot(folder / PICTURE)
    except OptionError as error:
        warn(f"{folder / PICTURE} wasn't drawn: {error}")
