"""A model of timm's that is small as it is, optimised, and images for it."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor

import gtp_fx

from support.zoo import enliven

NAME = "test_vit"


def small(depth: int = 3, **options: Any) -> gtp_fx.OptimizedModel:
    return gtp_fx.optimize(
        enliven(timm.create_model(NAME, depth=depth)).eval(), **{"flops_budget": 0.7, "compile": False, **options}
    )


def noise(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 160, 160, generator=torch.Generator().manual_seed(batch))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
