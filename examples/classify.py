"""A timm classifier on pictures, before and after.

python examples/classify.py photo.jpg other.jpg --model deit_small_patch16_224 --pretrained --flops-budget 0.74
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import gtp_fx
from gtp_fx.cli.models import load_named
from gtp_fx.cli.photo import prepared, read_picture


@torch.no_grad()
def main(
    pictures: Annotated[list[Path], typer.Argument(help="JPEG or PNG files.")],
    model: Annotated[str, typer.Option(help="timm's name.")] = "deit_small_patch16_224",
    flops_budget: Annotated[float, typer.Option(help="FLOPs after / before at most.")] = 0.74,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download its weights.")] = False,
    weights: Annotated[str | None, typer.Option(help="Or a file of them.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="By Inductor, in minutes: for many pictures.")] = False,
) -> None:
    loaded = load_named(model, pretrained=pretrained, weights=weights)
    fast = gtp_fx.optimize(loaded.model, flops_budget=flops_budget, compile=compiled)
    print(f"{loaded.name}, weights: {loaded.weights_origin}; {fast.report.flops_ratio:.3f} of its FLOPs")
    images = torch.cat([prepared(loaded.model, read_picture(picture)) for picture in pictures])
    for picture, before, after in zip(pictures, loaded.model(images), fast(images), strict=True):
        told = [f"{logits.argmax()} ({logits.softmax(0).max():.0%})" for logits in (before, after)]
        print(f"{picture.name}: class {told[0]} before, {told[1]} after")


if __name__ == "__main__":
    typer.run(main)
