"""The command line, `gtp-fx`. Results go to stdout, progress and errors to stderr.

Exit codes: 0 for success, 1 where a check found a wrong output, 2 for an error that the user can fix, 3 for a
fault of gtp_fx itself.
"""

from __future__ import annotations

from typing import Annotated

import typer

import gtp_fx
from gtp_fx.cli.bench import bench
from gtp_fx.cli.eval import evaluate
from gtp_fx.cli.export import export
from gtp_fx.cli.inspect import inspect
from gtp_fx.cli.optimize import optimize
from gtp_fx.cli.plan import plan
from gtp_fx.cli.show import show
from gtp_fx.cli.tune import tune

app = typer.Typer(
    help="Make pre-trained vision transformers faster by graph-based token propagation.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
main = app


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gtp-fx {gtp_fx.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the subcommand."""


_root.__doc__ = app.info.help
for command, summary in (
    (optimize, "Optimise MODEL, check it on a photograph, time it."),
    (inspect, "Print MODEL's attention blocks, and what can be done at each."),
    (plan, "Print what a budget would do to MODEL, without compiling."),
    (bench, "Time MODEL against its optimised forms, by budget."),
    (evaluate, "Measure accuracy or agreement on your images, by budget."),
    (show, "Draw which of a photograph's tokens go, and where to."),
    (export, "Optimise MODEL and write it as ONNX or .pt2."),
    (tune, "Measure this machine, so that predictions for it are right."),
):
    app.command("eval" if command is evaluate else None, short_help=summary)(
        command
    )  # whole in 80 columns, where a docstring is cut


if __name__ == "__main__":
    main()
