"""Photographs that nobody made for this project, and a net that somebody else trained on them.

CIFAR-10 (Krizhevsky 2009) as JPEGs in train/CLASS/ and test/CLASS/, from a folder or a tar of it; neither is part of
this repository. The net is a post-norm transformer over patches of 4 x 4, built from the names of its weights.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PostNormNet(nn.Module):
    """32 x 32 pixels, 64 patches and a CLS token, six encoder layers of 128 channels, norms behind."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 128, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 128))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, 128))
        layer = nn.TransformerEncoderLayer(128, 8, dim_feedforward=256, dropout=0.1, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 6)
        self.mlp_head = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        scores: Tensor = self.mlp_head(self.transformer(x)[:, 0])
        return scores


def load_net(weights: Path) -> PostNormNet:
    """The net with the weights of a state dict's file, in eval mode."""
    model = PostNormNet()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def load_photographs(data: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` photographs of each class, by name: normalised [10 * count, 3, 32, 32], and their classes.

    data: a folder, or a .tar.xz, that holds train/ and test/. split: one of those names.
    """
    chosen: dict[str, list[str]] = {}
    if data.is_dir():
        names = sorted(str(path.relative_to(data)) for path in data.glob(f"**/{split}/*/*.jpg"))
        content = {name: (data / name).read_bytes() for name in _some(names, count, chosen)}
    else:
        with tarfile.open(data) as packed:
            members = {member.name: member for member in packed if f"{split}/" in member.name and member.isfile()}
            wanted = _some(sorted(members), count, chosen)
            # In the order of the archive: going back means unpacking anew.
            inside = sorted(wanted, key=lambda name: members[name].offset)
            content = {name: packed.extractfile(members[name]).read() for name in inside}  # type: ignore[union-attr]
    images, labels = [], []
    for number, name in enumerate(sorted(chosen)):
        for file in chosen[name]:
            pixels = np.asarray(Image.open(io.BytesIO(content[file])).convert("RGB"), np.float32) / 255
            images.append(torch.from_numpy((pixels - _MEAN) / _DEVIATION).permute(2, 0, 1).float())
            labels.append(number)
    return torch.stack(images), torch.tensor(labels)


def _some(names: list[str], count: int, chosen: dict[str, list[str]]) -> list[str]:
    """Sorted into `chosen` by class."""
    by_class: dict[str, list[str]] = {}
    for name in names:
        by_class.setdefault(name.split("/")[-2], []).append(name)
    chosen.update({kind: files[:count] for kind, files in by_class.items()})
    return [file for files in chosen.values() for file in files]
