"""Patch features, full resolution, before and after: three principal components as red, green and blue.

    python examples/dense_features.py photo.jpg --model vit_small_patch14_dinov2 --pretrained --flops-budget 0.6

Tokens that left come back in the map where a reader wants all of them, so what reads dense features needs no change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import gtp_fx
from gtp_fx.cli.models import load_named
from gtp_fx.cli.photo import prepared, read_picture


@torch.no_grad()
def main(
    picture: Annotated[Path, typer.Argument(help="A JPEG or PNG.")],
    model: Annotated[str, typer.Option(help="timm's name.")] = "vit_small_patch14_dinov2",
    flops_budget: Annotated[float, typer.Option(help="FLOPs after / before at most.")] = 0.6,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("features.png"),
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download its weights.")] = False,
) -> None:
    loaded = load_named(model, pretrained=pretrained)
    fast = gtp_fx.optimize(loaded.model, flops_budget=flops_budget, compile=False)
    image = prepared(loaded.model, read_picture(picture))
    prefix, grid = loaded.model.num_prefix_tokens, loaded.model.patch_embed.grid_size
    before, after = (m.forward_features(image)[0, prefix:] for m in (loaded.model, fast))
    alike = torch.cosine_similarity(before, after, dim=1)
    directions = torch.pca_lowrank(before, q=3)[2]
    views = [_coloured(features @ directions, grid) for features in (before, after)]
    _side_by_side(views, ["every token", f"{fast.report.flops_ratio:.3f} of the FLOPs"]).save(out)
    print(f"{loaded.name}, weights: {loaded.weights_origin}; {fast.report.flops_ratio:.3f} of its FLOPs")
    print(
        f"cosine of each patch's features with the original's: {alike.mean():.4f} (least {alike.min():.4f}); "
        f"written: {out}"
    )


def _side_by_side(views: list[Tensor], titles: list[str]) -> Image.Image:
    """Views [rows, columns, 3] of bytes as one picture, each under its title."""
    side, above = 512, 40
    whole = Image.new("RGB", (side * len(views), above + side), "white")
    write, font = ImageDraw.Draw(whole), ImageFont.load_default(size=22)
    for number, (view, title) in enumerate(zip(views, titles, strict=True)):
        whole.paste(
            Image.fromarray(view.numpy()).resize((side, side), Image.Resampling.NEAREST), (side * number, above)
        )
        write.text((side * number + side // 2, above // 2), title, fill="black", font=font, anchor="mm")
    return whole


def _coloured(components: Tensor, grid: tuple[int, int]) -> Tensor:
    """[G, 3] as [rows, columns, 3] bytes, each component over its whole range."""
    low, high = components.amin(0), components.amax(0)
    return ((components - low) / (high - low) * 255).to(torch.uint8).reshape(*grid, 3)


if __name__ == "__main__":
    typer.run(main)
