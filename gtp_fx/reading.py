"""What the commands have in common: reading what a person typed, and failing as a command does."""

from __future__ import annotations

from enum import Enum
from typing import NoReturn

import typer

from gtp_fx.errors import OptionError

MODEL = (
    "timm's name (deit_small_patch16_224), a Hugging Face directory, name or class (ViTForImageClassification), or "
    "package.module:factory."
)
"""What a command may be given, for its help; `gtp_fx.sources` reads it."""


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


def parse_schedule(text: str) -> str | tuple[int, ...]:
    """A schedule's name, which is checked later, or its counts: "8,8,8" gives (8, 8, 8). Raises OptionError."""
    if text.isalpha():
        return text
    try:
        return tuple(int(entry) for entry in text.split(","))
    except ValueError:
        raise OptionError(
            f"--schedule {text!r} is neither auto, uniform, even nor a list of counts; give the tokens that leave in each "
            f"attention block, such as 8,8,8"
        ) from None


def parse_latency(text: str) -> float | str:
    """A ratio as a number; whatever else as it is, which is checked later."""
    try:
        return float(text)
    except ValueError:
        return text


def fail(message: str, code: int) -> NoReturn:
    typer.echo(f"gtp-fx: {message}", err=True)
    raise typer.Exit(code)
