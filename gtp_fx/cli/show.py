"""`gtp-fx show`: draw which of an image's tokens are removed, and where they are propagated to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import gtp_fx
from gtp_fx.cli.arguments import AsJson, Model
from gtp_fx.cli.endings import explaining, say_aside
from gtp_fx.cli.files import Overwrite, may_write
from gtp_fx.cli.groups import Making, Source, grouped


@grouped
def show(
    model: Model,
    making: Making,
    source: Source,
    image: Annotated[
        Path | None, typer.Argument(metavar="IMAGE", help="A JPEG or PNG. Default: the package's photograph.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("tokens.png"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Draw what becomes of IMAGE's tokens in MODEL.

    At each site: which tokens are kept and removed, and which ones receive the removed ones; at the end, the token
    scales. In a model with windowed attention: which tokens skip at each site, and which windows rest.
    """
    from gtp_fx.cli.photo import as_seen, load_photo, prepared, read_picture
    from gtp_fx.report.draw_token_flow import draw_token_flow
    from gtp_fx.report.text import wrapped
    from gtp_fx.report.token_flow import token_flow
    from gtp_fx.strategies.auto import chosen_by

    with explaining(model):
        chosen = making.checked()
        may_write(out, overwrite, "--out", drawn=True)
        picture = load_photo() if image is None else read_picture(image)
        loaded = source.load(model)
        fast = gtp_fx.optimize(loaded.model, **chosen.options(loaded.model), compile=False)
        pixels = prepared(loaded.model, picture)
        views = token_flow(fast.graph_module, fast.sites, fast.report.sites, pixels)
        title = f"{loaded.name}, weights: {loaded.weights_origin}; {fast.report.flops_ratio:.3f} of its FLOPs, "
        chosen_name = chosen_by(making.strategy, fast.strategy)
        title += making.strategy + (f": {chosen_name}" if chosen_name else "")
        if missing := len(fast.report.sites) - len(views):
            say_aside(
                f"{missing} of {len(fast.report.sites)} sites are not drawn: windows rest there without their cells"
            )
            title += f"; {missing} sites where windows rest are not drawn"
        draw_token_flow(views, as_seen(loaded.model, pixels), title, out)
    if as_json:
        about = {"model": loaded.name, "weights": loaded.weights_origin, "picture": str(out)}
        typer.echo(json.dumps({**about, "sites": [view.to_dict() for view in views]}, indent=2))
        return
    typer.echo(wrapped(f"{title}\nwritten: {out}"))
