"""An image set on disk as a list of images, with labels where there are some.

    DIR/n01440764/*.JPEG, DIR/n01443537/*.JPEG, …     the label is the folder's index by name, or in a class map
    DIR/*.tar                                          members KEY.jpg and KEY.cls, whose text is the label
    DIR/*.jpg                                          no labels

Images are opened when they are asked for; a shard is indexed once and read by offset.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from gtp_fx.errors import OptionError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
"""Of images, in lower case."""
NO_LABEL = -1
NO_CLASSES = "the model's outputs are features, no classes"
"""Why there are no labels for such a model."""


@dataclass(frozen=True)
class Item:
    """One image: a file, or `size` bytes from `offset` of a shard.

    label: its class, as the model counts them, or `NO_LABEL`.
    """

    file: Path
    label: int
    offset: int = 0
    size: int = -1

    def image(self) -> Image.Image:
        """Return the picture, RGB. Raises OptionError where the file holds none."""
        from PIL import Image, UnidentifiedImageError

        with self.file.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        try:
            return Image.open(io.BytesIO(content)).convert("RGB")
        except UnidentifiedImageError as error:
            raise OptionError(f"{self.file} is no picture that Pillow reads: leave it out of the data") from error
        except OSError as error:
            raise OptionError(f"{self.file} can't be read as a picture ({error}): leave it out of the data") from error


@dataclass(frozen=True)
class ImageSet:
    """An image set on disk.

    root: what the items' names are told from.
    items: in an order that is the same each time.
    unlabelled: why there are no labels, in words; "" where every item has one.
    """

    root: Path
    items: tuple[Item, ...]
    unlabelled: str = ""

    @property
    def fingerprint(self) -> str:
        """A hash of the listing (names, sizes, places and labels), not of what the images hold."""
        digest = hashlib.sha256()
        for item in self.items:
            size = item.size if item.size >= 0 else item.file.stat().st_size
            digest.update(f"{item.file.relative_to(self.root)} {item.offset} {size} {item.label}\n".encode())
        return digest.hexdigest()[:16]

    def evenly(self, limit: int | None) -> ImageSet:
        """Return a set of at most `limit` of the images, evenly spaced, so that every class has its share."""
        if limit is None or limit >= len(self.items):
            return self
        return replace(self, items=tuple(self.items[i * len(self.items) // limit] for i in range(limit)))


@dataclass(frozen=True, eq=False)
class Transformed(Dataset[tuple[Tensor, int, int]]):
    """Some images of a set as a loader wants them: tensor, label, and place in the set."""

    images: ImageSet
    places: Sequence[int]
    transform: Callable[[Any], Tensor]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        place = self.places[index]
        item = self.images.items[place]
        return self.transform(item.image()), item.label, place


def read_set(
    root: Path, outputs: int | None, class_map: Path | None = None, names: Mapping[str, int] | None = None
) -> ImageSet:
    """Return the images under `root`, with labels if the set and the model have the same classes.

    outputs: the number of the model's classes; None where it has none.
    class_map: a file of folder names, one a line, in the order of the outputs.
    names: the model's own names of its classes; they count where each folder has one of them.

    Raises OptionError where there are no images, or where the labels that are there can't be read.
    """
    if not root.is_dir():
        raise OptionError(
            f"data {str(root)!r} is no folder: give one with images, with a folder for each class, or with .tar shards"
        )
    shards = sorted(root.glob("*.tar"))
    loose = [file for file in sorted(root.iterdir()) if file.suffix.lower() in SUFFIXES]
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if loose and (folders or shards):
        raise OptionError(
            f"data {str(root)!r} holds both images ({loose[0].name}, …) and {(folders or shards)[0].name}: "
            f"give a folder of images, or one of class folders or shards alone"
        )
    found = (
        _of_shards(root, shards)
        if shards
        else ImageSet(root, tuple(Item(file, NO_LABEL) for file in loose), "it has no class folders")
        if loose
        else _of_folders(root, folders, outputs, class_map, names or {})
    )
    if not found.items:
        raise OptionError(f"data {str(root)!r} holds no image ({', '.join(SUFFIXES)})")
    if class_map is not None and (shards or loose):
        raise OptionError(f"class_map={str(class_map)!r} says which output is which folder, and {root} has no folders")
    if outputs is None:
        return _without_labels(found, NO_CLASSES)
    if not found.unlabelled:
        outside = [item for item in found.items if not 0 <= item.label < outputs]
        if outside:
            raise OptionError(
                f"{outside[0].file} has label {outside[0].label}, and the model has outputs 0 to {outputs - 1}"
            )
    return found


def _without_labels(images: ImageSet, why: str) -> ImageSet:
    return ImageSet(images.root, tuple(replace(item, label=NO_LABEL) for item in images.items), why)


def _of_folders(
    root: Path, folders: Sequence[Path], outputs: int | None, class_map: Path | None, names: Mapping[str, int]
) -> ImageSet:
    unlabelled = ""
    if class_map is not None and outputs is not None:
        labels = _mapped(root, folders, outputs, class_map)
    elif all(folder.name in names for folder in folders):
        labels = {folder.name: names[folder.name] for folder in folders}
    else:
        labels = {folder.name: label for label, folder in enumerate(folders)}
        if len(folders) != outputs:
            unlabelled = (
                f"it has {len(folders)} folders and the model {outputs} outputs: give --class-map FILE "
                f"(class_map=), a folder's name a line in the order of the outputs"
            )
    items = tuple(
        Item(file, labels[folder.name])
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in SUFFIXES
    )
    found = ImageSet(root, items)
    return _without_labels(found, unlabelled) if unlabelled else found


def _mapped(root: Path, folders: Sequence[Path], outputs: int, class_map: Path) -> dict[str, int]:
    """Return the folders' labels by a class map."""
    names = [line.strip() for line in class_map.read_text().splitlines() if line.strip()]
    if len(names) != outputs:
        raise OptionError(
            f"{class_map} has {len(names)} names and the model {outputs} outputs: give a folder's name in each "
            f"line, one for each output, in their order"
        )
    labels = {name: label for label, name in enumerate(names)}
    if strange := [folder.name for folder in folders if folder.name not in labels]:
        raise OptionError(f"{class_map} lacks {len(strange)} folders of {str(root)!r}: {', '.join(strange[:3])}, …")
    return labels


def _of_shards(root: Path, shards: Sequence[Path]) -> ImageSet:
    items, alone = [], ""
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
        alone = alone or next((f"{shard}: {key} has no {key}.cls beside it" for key in places if key not in labels), "")
        items += [Item(shard, labels.get(key, NO_LABEL), *places[key]) for key in sorted(places)]
    found = ImageSet(root, tuple(items))
    return _without_labels(found, alone) if alone else found


def _label(text: bytes, shard: Path, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"{shard}: {name} holds {text[:20]!r}, no number of a class") from None
