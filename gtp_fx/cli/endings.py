"""How a command ends where something goes wrong, and what it says beside its results, on stderr."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import NoReturn

import typer

from gtp_fx.errors import CheckError, GtpError, InternalError


@contextlib.contextmanager
def explaining(model: str = "") -> Iterator[None]:
    """End the command with the message alone for errors that the user can fix, and for wrong outputs.

    Any other error is a fault of gtp_fx: its message follows its traceback.

    model: name that precedes the message of a CheckError.
    """
    from gtp_fx.model.internal_errors import internal_errors_reported

    try:
        with internal_errors_reported():
            yield
    except InternalError as error:
        traceback.print_exception(error.__cause__)
        _fail(str(error), 3)
    except GtpError as error:
        _fail(str(error), 2)
    except CheckError as error:
        _fail(f"{model}: {error}", 1)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}", 2)


def say_aside(message: str) -> None:
    """Print a message to stderr, wrapped for the terminal."""
    from gtp_fx.report.text import wrapped

    typer.echo(wrapped(message), err=True)


def _fail(message: str, code: int) -> NoReturn:
    say_aside(f"gtp-fx: {message}")
    raise typer.Exit(code)
