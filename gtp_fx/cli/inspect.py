"""`gtp-fx inspect`: print what the compiler sees in a model."""

from __future__ import annotations

import json

import typer

from gtp_fx.cli.arguments import (
    AsJson,
    Model,
    explaining,
)


def inspect(
    model: Model,
    as_json: AsJson = False,
) -> None:
    """Print MODEL's attention blocks and their tokens, what can be done at each block, what can't, and why.

    The model is built without its weights, and nothing is rewritten.
    """
    from gtp_fx.cli.models import named_on_meta
    from gtp_fx.model.preview import inspect_model

    with explaining():
        found = inspect_model(named_on_meta(model))
    typer.echo(json.dumps({"model": model, **found.to_dict()}, indent=2) if as_json else f"{model} {found}")
