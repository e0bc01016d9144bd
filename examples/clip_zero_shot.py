"""CLIP, zero-shot: the image tower is optimised, the text tower is left alone.

    python examples/clip_zero_shot.py photo.jpg --labels "a cat" --labels "a dog" --model openai/clip-vit-base-patch32

MODEL is a name on the hub or a directory with CLIP's configuration, weights, tokenizer and image processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

import gtp_fx


@torch.no_grad()
def main(
    picture: Annotated[Path, typer.Argument(help="A JPEG or PNG.")],
    labels: Annotated[list[str], typer.Option(help="What it may show; repeat.")],
    model: Annotated[str, typer.Option(help="Name or directory.")] = "openai/clip-vit-base-patch32",
    flops_budget: Annotated[float, typer.Option(help="Of the image tower's FLOPs.")] = 0.74,
) -> None:
    clip = CLIPModel.from_pretrained(model).eval()
    processor = CLIPProcessor.from_pretrained(model)
    given = processor(text=labels, images=Image.open(picture).convert("RGB"), return_tensors="pt", padding=True)
    before = clip(**given).logits_per_image

    # Whatever holds a tower may hold the optimised one instead: it is called the same and returns the same. The example
    # is a call as the owner makes it, flags and all, since a graph is good for calls of that form.
    call = {"pixel_values": given["pixel_values"], "return_dict": True}
    clip.vision_model = gtp_fx.optimize(clip.vision_model, flops_budget=flops_budget, example_inputs=call)
    after = clip(**given).logits_per_image
    print(f"{clip.vision_model.report.flops_ratio:.3f} of the image tower's FLOPs")
    for label, old, new in zip(labels, before.softmax(1)[0], after.softmax(1)[0], strict=True):
        print(f"{label}: {old:.1%} before, {new:.1%} after")


if __name__ == "__main__":
    typer.run(main)
