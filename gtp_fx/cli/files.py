"""What commands write: one rule for files that are there already, and the options that name files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gtp_fx.errors import OptionError

if TYPE_CHECKING:
    from gtp_fx.options.schedule import Schedule

SaveSchedule = Annotated[
    Path | None,
    typer.Option(
        help="Write the schedule, and which strategy it is for, to this JSON file: give it to --schedule, with the "
        "same --strategy."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")]


def may_write(file: Path | None, overwrite: bool, option: str = "", drawn: bool = False) -> None:
    """Check, before any work is done, that a command may write a file; None stands for none.

    overwrite: whether it may replace one.
    option: the option that names the file, for the message; "" where it is an argument.
    drawn: whether it is a picture.

    Raises OptionError where the folder doesn't exist, the file does, or no such picture can be drawn.
    """
    from gtp_fx.report.plots import must_draw, must_have_folder

    if file is None:
        return
    must_have_folder(file)
    if drawn:
        must_draw(file)
    if file.is_dir():
        raise OptionError(f"{file} is a folder: give {option or 'FILE'} the name of a file")
    if file.exists() and not overwrite:
        raise OptionError(f"{file} exists already: give {option or 'FILE'} another name, or --overwrite to replace it")


def write_schedule(schedule: Schedule, file: Path) -> None:
    """Write a schedule as JSON."""
    file.write_text(schedule.to_json() + "\n")
