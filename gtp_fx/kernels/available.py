"""Where GTP's kernels run, and what they are made for. Imports no Triton until it is asked to."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

_LEAST_CAPABILITY = (8, 0)
"""Ampere: the kernels' tiles want its shared memory, and bfloat16 its tensor cores."""


def has_kernels(device: torch.device) -> bool:
    """Whether GTP's kernels run on `device`: an NVIDIA GPU of Ampere's generation or later, with Triton installed."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


@dataclass(frozen=True)
class Kernels:
    """What a lowering has to choose from: operators, and what they are made for."""

    token_graph: Any
    attend: Any
    attention_scores: Any
    select: Any
    propagate: Any
    recover: Any
    most_neighbors: int
    heads: tuple[int, int]
    most_cells: int
    most_channels: int


def load_kernels() -> Kernels:
    """Registers them. Raises ImportError where Triton isn't installed."""
    modules = {
        name: importlib.import_module(f"gtp_fx.kernels.{name}")
        for name in ("token_graph", "attention", "scores", "select", "propagate", "recover")
    }
    kernels = torch.ops.gtp_fx_kernels
    return Kernels(
        token_graph=kernels.token_graph.default,
        attend=kernels.attend.default,
        attention_scores=kernels.attention_scores.default,
        select=kernels.select.default,
        propagate=kernels.propagate.default,
        recover=kernels.recover.default,
        most_neighbors=modules["token_graph"].MOST_NEIGHBORS,
        heads=modules["attention"].HEADS,
        most_cells=modules["select"].MOST_CELLS,
        most_channels=modules["propagate"].MOST_CHANNELS,
    )
