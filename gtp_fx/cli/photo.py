"""Photographs as input batches.

Token propagation depends on the similarity of tokens, so a check on noise says little. The packaged photograph is in
data/, with its source.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from gtp_fx.errors import OptionError
from gtp_fx.measure.evaluation.image_set import SUFFIXES
from gtp_fx.measure.preparation import image_example, preparation_of

_LEAST_SCALE = 0.6
"""Smallest crop, as a share of the photograph's sides. The subject stays visible."""

_MOST = 64
"""The most pictures that are taken from a folder."""


def photo_batch(model: nn.Module, batch: int) -> Tensor:
    """Return [batch, 3, height, width] in the model's size, dtype and device, prepared as the model wants it.

    Image 0 is the whole photograph. The others are crops, half of them mirrored, the same in each call.

    Raises OptionError for a batch below 1 or a model without 3 channels, CaptureError where the input size is unknown,
    and LoadError where timm isn't installed.
    """
    if batch < 1:
        raise OptionError(f"batch={batch}: give at least one image")
    example = image_example(model)
    prepare = preparation_of(model).transform()
    images = torch.stack([prepare(view) for view in _views(load_photo(), batch)])
    return images.to(example.device, example.dtype)


def prepared(model: nn.Module, picture: Image.Image) -> Tensor:
    """Return a picture as [1, 3, height, width] in the model's size, dtype and device, prepared for it.

    Raises as `photo_batch` does.
    """
    example = image_example(model)
    image = preparation_of(model).transform()(picture.convert("RGB"))
    return image[None].to(example.device, example.dtype)


def pictures_in(folder: Path) -> list[Path]:
    """Return the picture files in a folder and the folders inside, by name; up to 64, evenly spaced.

    Raises OptionError where there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise OptionError(f"{folder} is no folder: give one of photographs")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise OptionError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}): give a folder of photographs")
    count = min(_MOST, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def prepared_batch(model: nn.Module, pictures: Sequence[Path]) -> Tensor:
    """Return picture files as [pictures, 3, height, width], as `prepared` returns one.

    Raises as `read_picture` and `prepared` do.
    """
    return torch.cat([prepared(model, read_picture(file)) for file in pictures])


def as_seen(model: nn.Module, image: Tensor) -> Tensor:
    """Return a prepared image [1, 3, height, width] as [height, width, 3] in [0, 1], for display."""
    config = preparation_of(model).config
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    seen: Tensor = image[0].detach().cpu().float() * std + mean
    return seen.clamp(0, 1).permute(1, 2, 0)


def read_picture(path: Path) -> Image.Image:
    """Return the picture in a file, RGB. Raises OptionError where it can't be read."""
    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except UnidentifiedImageError as error:
        raise OptionError(f"{path} is no picture that Pillow reads; give a JPEG or PNG") from error
    except OSError as error:
        raise OptionError(f"{path} can't be read: {error.strerror or error}; give a JPEG or PNG") from error


def load_photo() -> Image.Image:
    """Return the packaged photograph, RGB."""
    with files("gtp_fx.cli").joinpath("data", "photo.jpg").open("rb") as file:
        return Image.open(file).convert("RGB")


def _views(photo: Image.Image, count: int) -> list[Image.Image]:
    """Return `count` different views of the photograph, with its aspect ratio."""
    chance = random.Random(0)
    views = [photo]
    for index in range(1, count):
        scale = chance.uniform(_LEAST_SCALE, 1)
        width, height = round(photo.width * scale), round(photo.height * scale)
        left, top = chance.randint(0, photo.width - width), chance.randint(0, photo.height - height)
        view = photo.crop((left, top, left + width, top + height))
        views.append(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if index % 2 else view)
    return views
