"""Models that write text about images: the patch tokens are in a tower inside, and a graph can't hold the rest.

What they return for one token holds a cache of keys and values for the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gtp_fx.errors import CaptureError


def must_not_write_text(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Raise CaptureError, which names the tower, where `model` generates text and returns a cache for the next token.

    It is told by what transformers gives to every such model: `generate`, and configurations of the tower and of the
    language model, of which the latter says `use_cache`.

    given: keyword arguments of the call, which may say otherwise.
    """
    config: Any = getattr(model, "config", None)
    if not callable(getattr(model, "generate", None)) or not hasattr(config, "vision_config"):
        return
    of_text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not given.get("use_cache", getattr(of_text, "use_cache", False)):
        return
    tower = tower_of(model)
    path = repr(tower) if tower else "…"
    inside = path if tower else "a tower inside"
    raise CaptureError(
        f"{model._get_name()} generates text: each call returns a cache for the next token, which a graph of tensors "
        f"can't. The patch tokens of its images are in {inside}; optimise that. docs/towers.md has two ways:\n"
        f"  as many image tokens as before:  tower = gtp_fx.optimize(model.get_submodule({path}), example_inputs=…, "
        f"flops_budget=…); model.set_submodule({path}, tower)\n"
        f"  shorter prompts as well:  gtp_fx.fewer_image_tokens(model, inputs, tower={path}, flops_budget=…)"
    )


def tower_of(model: nn.Module) -> str:
    """Return the path of the module that is built by a model's `vision_config`; "" where none is."""
    wanted = getattr(getattr(model, "config", None), "vision_config", None)
    built = [
        path
        for path, part in model.named_modules()
        if wanted is not None and part is not model and getattr(part, "config", None) is wanted
    ]
    return min(built, key=lambda path: path.count("."), default="")
