"""`gtp-fx show`: draw which of an image's tokens are removed, and where they are propagated to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import gtp_fx
from gtp_fx.cli.arguments import (
    AsJson,
    Batch,
    Device,
    Dtype,
    FlopsBudget,
    ImgSize,
    LatencyBudget,
    Model,
    ModelArgs,
    NumClasses,
    Pretrained,
    ScheduleText,
    Strategy,
    Target,
    Weights,
    WeightsKey,
    built_with,
    explaining,
    load,
    option_values,
    tell_of_auto,
)
from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS


def show(
    model: Model,
    image: Annotated[
        Path | None, typer.Argument(metavar="IMAGE", help="A JPEG or PNG. Default: the package's photograph.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("tokens.png"),
    flops_budget: FlopsBudget = DEFAULTS["flops_budget"],
    latency_budget: LatencyBudget = DEFAULTS["latency_budget"],
    schedule: ScheduleText = DEFAULTS["schedule"],
    strategy: Strategy = DEFAULTS["strategy"],
    target: Target = DEFAULTS["target"],
    batch: Batch = DEFAULTS["batch"],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the picture if it is there.")] = False,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    pretrained: Pretrained = False,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    model_arg: ModelArgs = None,
    as_json: AsJson = False,
) -> None:
    """Draw what becomes of IMAGE's tokens in MODEL.

    At each site: which tokens are kept and removed, and which ones receive the removed ones; at the end, the token
    scales. In a model with windowed attention: which tokens skip at each site.
    """
    from gtp_fx.cli.photo import as_seen, load_photo, prepared, read_picture
    from gtp_fx.report.draw_token_flow import draw_token_flow
    from gtp_fx.report.plots import must_draw
    from gtp_fx.report.token_flow import token_flow

    with explaining(model):
        options = option_values(flops_budget, latency_budget, schedule, strategy, target, batch)
        tell_of_auto([strategy])
        must_draw(out)
        if out.exists() and not overwrite:
            raise OptionError(f"{out} exists already: give --out another.png, or --overwrite to replace it")
        picture = load_photo() if image is None else read_picture(image)
        arguments = built_with(num_classes, img_size, model_arg)
        loaded = load(model, arguments, pretrained, weights, weights_key, Dtype.float32, Device.cpu)
        fast = gtp_fx.optimize(loaded.model, **options, compile=False)
        pixels = prepared(loaded.model, picture)
        views = token_flow(fast.graph_module, fast.sites, fast.report.sites, pixels)
        title = (
            f"{loaded.name}, weights: {loaded.weights_origin}; {fast.report.flops_ratio:.3f} of its FLOPs, {strategy}"
        )
        if resting := sum(bool(site.window_tokens) for site in fast.report.sites):
            typer.echo(f"{resting} of {len(fast.report.sites)} sites are not drawn: whole windows rest there", err=True)
            title += f"; {resting} sites where windows rest are not drawn"
        draw_token_flow(views, as_seen(loaded.model, pixels), title, out)
    if as_json:
        about = {"model": loaded.name, "weights": loaded.weights_origin, "picture": str(out)}
        typer.echo(json.dumps({**about, "sites": [view.to_dict() for view in views]}, indent=2))
        return
    typer.echo(f"{title}\nwritten: {out}")
