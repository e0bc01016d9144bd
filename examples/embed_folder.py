"""A large folder of pictures to embeddings, on as many processes as there are.

    torchrun --nproc-per-node 8 examples/embed_folder.py pictures embeddings --pretrained

Every process takes each n-th picture and writes part_<rank>.safetensors: `embeddings` [n, C], and beside it the files'
names, one a line. Existing parts are skipped, so an interrupted run continues. One process alone needs no torchrun.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import gtp_fx
from gtp_fx.cli.models import load_named
from gtp_fx.cli.photo import prepared, read_picture

KINDS = (".jpg", ".jpeg", ".png", ".webp")


class Pictures(Dataset[Tensor]):
    def __init__(self, files: list[Path], model: torch.nn.Module) -> None:
        self.files, self.model = files, model

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        return prepared(self.model, read_picture(self.files[number]))[0]


@torch.no_grad()
def main(
    folder: Annotated[Path, typer.Argument(help="Pictures, at any depth.")],
    out: Annotated[Path, typer.Argument(help="Where the parts go.")],
    model: Annotated[str, typer.Option(help="timm's name.")] = "vit_base_patch16_clip_224",
    flops_budget: Annotated[float, typer.Option(help="FLOPs after / before at most.")] = 0.74,
    batch: Annotated[int, typer.Option(help="Pictures per run.")] = 64,
    workers: Annotated[int, typer.Option(help="Processes that read pictures, for each that runs the model.")] = 4,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download its weights.")] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing: for a few pictures.")] = False,
) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    part = out / f"part_{rank:04d}.safetensors"
    if part.exists():
        print(f"{part} is there")
        return
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in KINDS)[rank::world]
    loaded = load_named(model, pretrained=pretrained)
    on_cpu = loaded.model.reset_classifier(0) or loaded.model  # timm's: embeddings instead of logits
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )
    reader = DataLoader(Pictures(files, on_cpu), batch, num_workers=workers)
    fast = gtp_fx.optimize(on_cpu, flops_budget=flops_budget, compile=not eager).to(device)
    found = [fast(images.to(device, non_blocking=True)).float().cpu() for images in reader]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"part_{rank:04d}.txt").write_text("".join(f"{file.relative_to(folder)}\n" for file in files))
    draft = part.with_suffix(".draft")
    save_file({"embeddings": torch.cat(found) if found else torch.empty(0)}, draft)
    draft.rename(part)  # whole or not at all
    print(
        f"{part}: {len(files)} pictures, {fast.report.flops_ratio:.3f} of the FLOPs, weights: {loaded.weights_origin}"
    )


if __name__ == "__main__":
    typer.run(main)
