"""Preparation of pictures for a model: the size, crop and normalisation that timm or Hugging Face has for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.signatures import tensors_in
from gtp_fx.errors import LoadError, OptionError

if TYPE_CHECKING:
    from PIL import Image

_UNKNOWN: dict[str, Any] = {
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
"""Data configuration for a model without timm's: the whole picture, normalised as for most such models."""
_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which Hugging Face's processors have, by timm's names."""


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes a model's input.

    config: settings of timm's evaluation transform: mean, std, crop_pct and the like.
    size: [3, height, width] of the input.
    source: where the settings are from, in words.
    """

    config: Mapping[str, Any]
    size: tuple[int, ...]
    source: str

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Return timm's evaluation transform, from a picture to a tensor of `size`. Raises LoadError without timm."""
        try:
            from timm.data.transforms_factory import create_transform
        except ImportError as error:
            raise LoadError(
                f"transforms of images come from timm, which can't be imported ({error}); pip install timm"
            ) from error
        return cast(
            "Callable[[Image.Image], Tensor]", create_transform(**{**self.config, "input_size": tuple(self.size)})
        )

    @property
    def key(self) -> str:
        """All settings as text, which differs where the prepared images would."""
        return json.dumps({**self.config, "input_size": list(self.size)}, sort_keys=True, default=str)

    def __str__(self) -> str:
        how = f"{self.config['interpolation']}, crop {self.config['crop_pct']:g} {self.config['crop_mode']}"
        return f"{self.size[1]} x {self.size[2]} pixels, {how}, by {self.source}"


def preparation_of(model: nn.Module) -> Preparation:
    """Return how a model's pictures are prepared.

    timm's `pretrained_cfg` says it, or the image processor beside a Hugging Face model's weights; else it is a default,
    and `source` says so.

    Raises OptionError for a model that takes no pictures of 3 channels, and CaptureError where its input size is
    unknown.
    """
    size = tuple(image_example(model).shape[1:])
    if isinstance(getattr(model, "pretrained_cfg", None), Mapping):
        from timm.data.config import resolve_data_config

        return Preparation(resolve_data_config({}, model=model), size, "timm's pretrained_cfg")
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    processor = _processor(name) if name else None
    if processor is not None:
        return Preparation(_config_of(processor), size, f"the image processor of {name}")
    return Preparation(_UNKNOWN, size, "default, since the model names no preparation of its own")


def image_example(model: nn.Module) -> Tensor:
    """Return the model's example input. Raises OptionError where it is no batch of images with 3 channels."""
    signature = call_signature(model, None)
    example = tensors_in((signature.args, signature.kwargs))[0]
    if example.ndim != 4 or example.shape[1] != 3:
        raise OptionError(
            f"{type(model).__name__} takes {list(example.shape[1:])}, but a photograph is [3, height, width]"
        )
    return example


def _processor(name: str) -> Any:
    """Return the image processor that lies beside a Hugging Face model's weights; None where none can be had."""
    try:
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (ImportError, OSError, ValueError):
        return None


def _config_of(processor: Any) -> dict[str, Any]:
    """Return an image processor's settings as those of timm's transform.

    A picture is squashed to its size, or its shorter side is scaled and the middle cropped out.
    """

    def has(name: str) -> Any:
        return getattr(processor, name, None)

    plain = has("do_normalize") is False
    mean, std = ((0.0,) * 3, (1.0,) * 3) if plain else (has("image_mean"), has("image_std"))
    size, crop, resample = dict(has("size") or {}), dict(has("crop_size") or {}), has("resample")
    found = {
        **_UNKNOWN,
        "mean": tuple(mean or _UNKNOWN["mean"]),
        "std": tuple(std or _UNKNOWN["std"]),
        "interpolation": _RESAMPLING.get(3 if resample is None else int(resample), "bicubic"),
    }
    scaled = size.get("shortest_edge") or size.get("height")
    if has("do_center_crop") and crop.get("height") and scaled:
        found |= {"crop_pct": crop["height"] / scaled, "crop_mode": "center"}
    elif size.get("shortest_edge"):
        found |= {"crop_mode": "center"}
    return found
