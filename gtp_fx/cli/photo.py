"""Photographs as input batches.

Token propagation depends on the similarity of tokens, so a check on noise says little. The packaged photograph is in
data/, with its source.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from gtp_fx.capture.inputs import call_signature
from gtp_fx.cli.weights import import_timm
from gtp_fx.errors import OptionError

_LEAST_SCALE = 0.6
"""Smallest crop, as a share of the photograph's sides. The subject stays visible."""

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Suffixes of picture files."""
_MOST = 64
"""The most pictures that are taken from a folder."""

_UNKNOWN: dict[str, Any] = {
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
"""Data configuration for a model without timm's: the whole picture, normalised as for most such models."""


def photo_batch(model: nn.Module, batch: int) -> Tensor:
    """Return [batch, 3, height, width] in the model's size, dtype and device, prepared as timm does for the model.

    Image 0 is the whole photograph. The others are crops, half of them mirrored, the same in each call.

    Raises OptionError for a batch below 1 or a model without 3 channels, CaptureError where the input size is unknown,
    and LoadError where timm isn't installed.
    """
    if batch < 1:
        raise OptionError(f"batch={batch}: give at least one image")
    example = _image_example(model)
    prepare = _preparation(model, tuple(example.shape[1:]))
    images = torch.stack([prepare(view) for view in _views(load_photo(), batch)])
    return images.to(example.device, example.dtype)


def prepared(model: nn.Module, picture: Image.Image) -> Tensor:
    """Return a picture as [1, 3, height, width] in the model's size, dtype and device, prepared as timm does.

    Raises as `photo_batch` does.
    """
    example = _image_example(model)
    image = _preparation(model, tuple(example.shape[1:]))(picture.convert("RGB"))
    return image[None].to(example.device, example.dtype)


def pictures_in(folder: Path) -> list[Path]:
    """Return the picture files in a folder and the folders inside, by name; up to 64, evenly spaced.

    Raises OptionError where there are none.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _PICTURES)
    if not files:
        raise OptionError(f"{folder} holds no pictures ({', '.join(_PICTURES)}): give a folder of photographs")
    count = min(_MOST, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def prepared_batch(model: nn.Module, pictures: Sequence[Path]) -> Tensor:
    """Return picture files as [pictures, 3, height, width], as `prepared` returns one.

    Raises as `read_picture` and `prepared` do.
    """
    return torch.cat([prepared(model, read_picture(file)) for file in pictures])


def as_seen(model: nn.Module, image: Tensor) -> Tensor:
    """Return a prepared image [1, 3, height, width] as [height, width, 3] in [0, 1], for display."""
    config = _data_config(model)
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


def _image_example(model: nn.Module) -> Tensor:
    """Return the model's example input. Raises OptionError where it is no batch of images with 3 channels."""
    signature = call_signature(model, None)
    example = next(v for v in (*signature.args, *signature.kwargs.values()) if isinstance(v, Tensor))
    if example.ndim != 4 or example.shape[1] != 3:
        raise OptionError(
            f"{type(model).__name__} takes {list(example.shape[1:])}, but a photograph is [3, height, width]"
        )
    return example


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


def _preparation(model: nn.Module, size: tuple[int, ...]) -> Callable[[Image.Image], Tensor]:
    """Return timm's evaluation transform, from an image to a tensor of `size`, [3, height, width].

    Raises LoadError where timm isn't installed.
    """
    import_timm("transforms of images")
    from timm.data.transforms_factory import create_transform

    return cast("Callable[[Image.Image], Tensor]", create_transform(**{**_data_config(model), "input_size": size}))


def _data_config(model: nn.Module) -> dict[str, Any]:
    """Return the settings of timm's transform for the model: mean, std, crop_pct and the like."""
    if not isinstance(getattr(model, "pretrained_cfg", None), Mapping):
        return _UNKNOWN
    from timm.data.config import resolve_data_config

    config: dict[str, Any] = resolve_data_config({}, model=model)
    return config
