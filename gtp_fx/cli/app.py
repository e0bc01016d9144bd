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
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options that stand before the subcommand."""


_root.__doc__ = app.info.help
for command in (optimize, inspect, plan, tune, bench, export, show):
    app.command()(command)
app.command("eval")(evaluate)


if __name__ == "__main__":
    main()
