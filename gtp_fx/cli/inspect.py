"""`gtp-fx inspect`: print what the compiler sees in a model."""

from __future__ import annotations

import json

import typer

from gtp_fx.cli.arguments import (
    AsJson,
    ImgSize,
    Model,
    ModelArgs,
    NumClasses,
    built_with,
    explaining,
)


def inspect(
    model: Model,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    model_arg: ModelArgs = None,
    as_json: AsJson = False,
) -> None:
    """Print MODEL's attention blocks and their tokens, what can be done at each block, what can't, and why.

    The model is built without its weights, and nothing is rewritten.
    """
    from gtp_fx.cli.models import named_on_meta
    from gtp_fx.cli.weights import with_arguments
    from gtp_fx.model.preview import inspect_model

    with explaining():
        arguments = built_with(num_classes, img_size, model_arg)
        found = inspect_model(named_on_meta(model, arguments))
        name = with_arguments(model, arguments)
    typer.echo(json.dumps({"model": name, **found.to_dict()}, indent=2) if as_json else f"{name} {found}")
