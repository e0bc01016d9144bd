"""An image set on disk as a list of images with labels: folders of classes, or webdataset shards.

    DIR/n01440764/*.JPEG, DIR/n01443537/*.JPEG, …     the label is the folder's index by name, or in a class map
    DIR/*.tar                                          members KEY.jpg and KEY.cls, whose text is the label

Images are opened when they are asked for; a shard is indexed once and read by offset.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
"""Of images, in lower case."""


class DataError(ValueError):
    """An image set that can't be evaluated on: the message says what is wrong and what would be right."""


@dataclass(frozen=True)
class Item:
    """One image: a file, or `size` bytes from `offset` of a shard. label: its class, as the model counts them."""

    file: Path
    label: int
    offset: int = 0
    size: int = -1

    def image(self) -> Image.Image:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return Image.open(io.BytesIO(file.read(self.size))).convert("RGB")


@dataclass(frozen=True)
class ImageSet:
    """items: in an order that is the same each time. root: what their names are told from."""

    root: Path
    items: tuple[Item, ...]

    @property
    def fingerprint(self) -> str:
        """Of the listing: names, places and labels, not of what the images hold."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item.file.relative_to(self.root)} {item.offset} {item.label}\n".encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Transformed(Dataset[tuple[Tensor, int, int]]):
    """Some images of a set as a loader wants them: tensor, label, and place in the set."""

    images: ImageSet
    places: Sequence[int]
    transform: Callable[[Image.Image], Any]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        place = self.places[index]
        item = self.images.items[place]
        return self.transform(item.image()), item.label, place


def read_set(root: Path, outputs: int, class_map: Path | None = None) -> ImageSet:
    """Return the images under `root`. Raises DataError where they can't be read as a set of labelled images.

    outputs: the number of the model's classes.
    class_map: a file of folder names, one a line, in the order of the outputs.
    """
    if not root.is_dir():
        raise DataError(f"data {str(root)!r} is no folder: give one with a folder for each class, or with .tar shards")
    shards = sorted(root.glob("*.tar"))
    items = _of_shards(shards) if shards else _of_folders(root, outputs, class_map)
    if not items:
        raise DataError(f"data {str(root)!r} holds no image ({', '.join(SUFFIXES)})")
    if outside := [item for item in items if not 0 <= item.label < outputs]:
        raise DataError(f"{outside[0].file} has label {outside[0].label}, and the model has outputs 0 to {outputs - 1}")
    return ImageSet(root, tuple(items))


def _of_folders(root: Path, outputs: int, class_map: Path | None) -> list[Item]:
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    if class_map is None:
        if len(folders) != outputs:
            raise DataError(
                f"data {str(root)!r} has {len(folders)} folders and the model {outputs} outputs: give --class-map "
                f"FILE, a folder's name a line in the order of the outputs, or a model with {len(folders)} classes"
            )
        labels = {folder.name: label for label, folder in enumerate(folders)}
    else:
        names = class_map.read_text().split()
        if len(names) != outputs:
            raise DataError(f"{class_map} has {len(names)} names and the model {outputs} outputs")
        labels = {name: label for label, name in enumerate(names)}
        if strange := [folder.name for folder in folders if folder.name not in labels]:
            raise DataError(f"{class_map} lacks {len(strange)} folders of {str(root)!r}: {', '.join(strange[:3])}, …")
    return [
        Item(file, labels[folder.name])
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]


def _of_shards(shards: Sequence[Path]) -> list[Item]:
    items = []
    for shard in shards:
        places: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, suffix = member.name.rpartition(".")
                if f".{suffix.lower()}" in SUFFIXES:
                    places[key] = member.offset_data, member.size
                elif suffix == "cls" and (text := archive.extractfile(member)) is not None:
                    labels[key] = _label(text.read(), shard, member.name)
        if alone := [key for key in places if key not in labels]:
            raise DataError(f"{shard}: {alone[0]} has no {alone[0]}.cls beside it, which would hold its label")
        items += [Item(shard, labels[key], *places[key]) for key in sorted(places)]
    return items


def _label(text: bytes, shard: Path, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{shard}: {name} holds {text[:20]!r}, no number of a class") from None
