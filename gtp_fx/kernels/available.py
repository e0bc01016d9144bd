"""Devices on which GTP's kernels run, and the sizes they are made for. Triton is imported by `load_kernels` only."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

_LEAST_CAPABILITY = (8, 0)
"""Ampere: the kernels' tiles need its shared memory, and bfloat16 its tensor cores."""


def has_kernels(device: torch.device) -> bool:
    """Return whether GTP's kernels run on `device`: an NVIDIA GPU, Ampere or later, with Triton installed."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


@dataclass(frozen=True)
class Kernels:
    """Kernels that a lowering may insert, and their limits.

    token_graph, attend, attention_scores, select, propagate, recover: overloads of `torch.ops.gtp_fx_kernels`.
    most_neighbors: largest M of `token_graph`.
    heads: smallest and largest head size of `attend` and `attention_scores`.
    most_cells: largest grid of `select`.
    most_channels: largest C of `propagate`.
    """

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
    """Register the kernels and return them. Raises ImportError where Triton isn't installed."""
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
