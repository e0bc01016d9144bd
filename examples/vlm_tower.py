"""A vision tower that hands fewer tokens on: what a language model reads is then shorter, too.

    python examples/vlm_tower.py photo.jpg --model openai/clip-vit-large-patch14-336 --flops-budget 0.5

The tower's contract is its full map. `with_provenance` also returns which of those tokens were kept, so that a
projector takes these alone. The language model's prefill shrinks by as much: with LLaVA's 576 patches and a budget of
0.5, some 250 stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel

import gtp_fx


class ShorterTower(nn.Module):
    """pixel_values [B, 3, h, w] -> the tokens left [B, K, C], and where each stood on the grid [B, K]."""

    def __init__(self, tower: nn.Module, flops_budget: float, prefix: int = 1) -> None:
        super().__init__()
        self.tower = gtp_fx.optimize(tower, flops_budget=flops_budget, compile=False)
        self.prefix = prefix

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        output, (patches,) = self.tower.with_provenance(pixel_values=pixel_values)
        tokens_BNC = output.last_hidden_state[:, self.prefix :]
        index_BK = patches.index
        return tokens_BNC.gather(1, index_BK[..., None].expand(-1, -1, tokens_BNC.shape[-1])), index_BK


@torch.no_grad()
def main(
    picture: Annotated[Path, typer.Argument(help="A JPEG or PNG.")],
    model: Annotated[
        str, typer.Option(help="Name or directory of a CLIP vision tower.")
    ] = "openai/clip-vit-large-patch14-336",
    flops_budget: Annotated[float, typer.Option(help="Of the tower's FLOPs.")] = 0.5,
    width: Annotated[int, typer.Option(help="Of the language model.")] = 4096,
) -> None:
    tower = CLIPVisionModel.from_pretrained(model).eval()
    pixels = CLIPImageProcessor.from_pretrained(model)(Image.open(picture).convert("RGB"), return_tensors="pt")
    shorter = ShorterTower(tower, flops_budget)
    tokens_BKC, index_BK = shorter(pixels["pixel_values"])
    projector = nn.Linear(tokens_BKC.shape[-1], width)  # yours, trained; it works on tokens one by one
    whole = tower(**pixels).last_hidden_state.shape[1] - 1
    print(f"{shorter.tower.report.flops_ratio:.3f} of the tower's FLOPs; {index_BK.shape[1]} of {whole} tokens go on")
    print(f"to the language model: {list(projector(tokens_BKC).shape)}")


if __name__ == "__main__":
    typer.run(main)
