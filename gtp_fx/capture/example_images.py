"""An image to capture a model with where the user gives none, from what the model says of itself.

Its size is in timm's `pretrained_cfg` or Hugging Face's `config`, and the name of its argument in `main_input_name`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gtp_fx.capture.signatures import BATCH
from gtp_fx.capture.wrapped import passed_on
from gtp_fx.errors import CaptureError


def image_argument(model: nn.Module) -> str | None:
    """Return the name of the image argument: HF's `main_input_name` ("pixel_values"), or the first parameter.

    None where the first is any number of them, which a wrapper passes on.
    """
    named = next((n for part in _inwards(model) if (n := getattr(part, "main_input_name", None))), None)
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    if named:
        return str(named)
    return None if first is not None and first.kind is first.VAR_POSITIONAL else first.name if first else "x"


def _inwards(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a model, and what is inside of it as long as that is called with the same."""
    inside: nn.Module | None = model
    while inside is not None:
        yield inside
        inside = passed_on(inside)


def example_image(model: nn.Module) -> Tensor:
    """Return zeros [2, channels, height, width], sized by timm's `pretrained_cfg` or HF's `config`.

    Of the model, or of the one inside of a wrapper. Raises CaptureError where there is neither.
    """
    found = (timm_shape(part) or _hf_shape(part) for part in _inwards(model))
    shape = next(filter(None, found), None)
    if shape is None:
        raise CaptureError(
            f"{type(model).__name__} has neither timm's pretrained_cfg nor a HF config that gives its input size: give "
            f"example_inputs=torch.randn(2, 3, 224, 224), or whatever it takes; on the command line, let the factory "
            f"set model.pretrained_cfg = {{'input_size': (3, 224, 224)}}"
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(BATCH, *shape, dtype=like.dtype, device=like.device)


def timm_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Return (channels, height, width) of a timm model, or None where it has no `pretrained_cfg`."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or "input_size" not in config:
        return None
    channels, *sides = config["input_size"]
    # A model built with in_chans= or img_size= still has the default pretrained_cfg. The first convolution knows the
    # actual channels, the patch embedding the actual size.
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    embed = getattr(model, "patch_embed", None)
    return (first.in_channels if first else channels, *(getattr(embed, "img_size", None) or sides))


def _hf_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Return (channels, height, width) of a Hugging Face model, or None where its config has no `image_size`."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)  # a vision tower may carry the configuration of the whole model
    side = getattr(config, "image_size", None)
    if side is None:
        return None
    sides = (side, side) if isinstance(side, int) else tuple(side)
    return (getattr(config, "num_channels", 3), *sides)
