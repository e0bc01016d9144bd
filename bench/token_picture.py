"""The picture in README: what becomes of the packaged photograph's tokens in a small net that was trained.

    python -m bench.token_picture --weights cifar10_postnorm.pth

The net is that of `bench.photographs`; its weights aren't part of this repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import gtp_fx
from bench.photographs import load_net
from gtp_fx.cli.photo import as_seen, load_photo, prepared
from gtp_fx.report.draw_token_flow import draw_token_flow
from gtp_fx.report.token_flow import SiteView, token_flow

PREPARED = {
    "input_size": (3, 32, 32),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
"""As timm says it: the net's own normalisation, of the photograph's middle."""


@torch.no_grad()
def main(
    weights: Annotated[Path, typer.Option(help="A file of the net's weights.")],
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/pictures/tokens.png"),
    flops_budget: Annotated[float, typer.Option(help="FLOPs after / before at most.")] = 0.74,
) -> None:
    model: Any = load_net(weights)
    model.pretrained_cfg = PREPARED
    fast = gtp_fx.optimize(model, flops_budget=flops_budget, compile=False)
    pixels = prepared(model, load_photo())
    views = token_flow(fast.graph_module, fast.sites, fast.report.sites, pixels)
    title = f"a net of six blocks, trained on CIFAR-10; {fast.report.flops_ratio:.3f} of its FLOPs"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_token_flow(views, as_seen(model, pixels), title, out, columns=3)
    removed = sum(len(view.removed) for view in views if isinstance(view, SiteView))
    print(f"{out}: {removed} of {pixels.shape[-1] ** 2 // 16} patches removed")


if __name__ == "__main__":
    typer.run(main)
