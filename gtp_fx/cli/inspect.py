"""`gtp-fx inspect`: print what the compiler sees in a model."""

from __future__ import annotations

import json

import typer

from gtp_fx.cli.arguments import AsJson, Model
from gtp_fx.cli.endings import explaining
from gtp_fx.cli.groups import Build, grouped


@grouped
def inspect(
    model: Model,
    build: Build,
    as_json: AsJson = False,
) -> None:
    """Print MODEL's attention blocks and their tokens, what can be done at each block, what can't, and why.

    The model is built without its weights, and nothing is rewritten.
    """
    from gtp_fx.cli.models import named_on_meta
    from gtp_fx.cli.weights import with_arguments
    from gtp_fx.model.preview import inspect_model
    from gtp_fx.report.text import wrapped

    with explaining():
        arguments = build.arguments
        found = inspect_model(named_on_meta(model, arguments))
        name = with_arguments(model, arguments)
    typer.echo(json.dumps({"model": name, **found.to_dict()}, indent=2) if as_json else f"{wrapped(name)}\n{found}")
