"""Classes of real libraries, each built small: a few narrow blocks on small images.

The libraries are an optional extra (`pip install gtp-fx[wild]`); a class of one that is missing is skipped. What is
listed is a matter of the bench alone; the compiler knows none of these names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
LIBRARIES = (
    "vit_pytorch",
    "vit_pytorch_stages",
    "birder",
    "medical",
    "kornia",
    "x_transformers",
    "vformer",
    "small_packages",
    "others",
    "hugging_face",
)
"""Modules of this folder, one a library or a group of small ones; each has MODELS."""


@dataclass(frozen=True)
class WildModel:
    """One class. build() makes it; shapes: of its positional arguments, without the batch."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]

    @property
    def key(self) -> tuple[str, str]:
        """Return what identifies the row."""
        return self.library, self.name

    def call(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Return noise for one call."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(batch, *shape, generator=generator) for shape in self.shapes)


class Calling(nn.Module):
    """A module called in another way: `how(module, *inputs)`, for arguments that are no batches of noise."""

    def __init__(self, module: nn.Module, how: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.how = how

    def forward(self, *inputs: Tensor) -> Any:
        """Return what `how` returns."""
        return self.how(self.module, *inputs)


def made(path: str, *arguments: Any, **settings: Any) -> nn.Module:
    """Build the class or call the function at `path`, "package.module:Name"."""
    module, name = path.split(":")
    found: nn.Module = getattr(importlib.import_module(module), name)(*arguments, **settings)
    return found


def of(
    library: str, path: str, *shapes: Shape, name: str = "", how: Callable[..., Any] | None = None, **settings: Any
) -> WildModel:
    """Return the entry for the class at `path`, built with `settings` and called with batches of `shapes`."""
    build = partial(made, path, **settings)
    return WildModel(
        library, name or path.split(":")[1], build if how is None else lambda: Calling(build(), how), shapes
    )


@cache
def every() -> tuple[WildModel, ...]:
    """Return all entries, library by library."""
    return tuple(
        model for library in LIBRARIES for model in importlib.import_module(f"bench.wild_models.{library}").MODELS
    )
