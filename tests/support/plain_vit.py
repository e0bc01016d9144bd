"""A plain vision transformer, small, whose parts a test may run in another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gtp_fx.capture.dynamo import capture_dynamo
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.model.pipeline import Optimised, run_passes
from gtp_fx.options.options import Options

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """Three blocks over a CLS token and 6 x 6 patches; logits [B, 7] of images [B, 3, 24, 24]."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(0.5 * torch.randn(1, 37, WIDTH))
        self.blocks = nn.Sequential(*(block() for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def tokens(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(image.shape[0], -1, -1), x], 1) + self.position

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(image)))[:, 0])  # type: ignore[no-any-return]


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """The model with the same weights as ever, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(count))


@dataclass(frozen=True)
class Door:
    """What the compiler makes of a model that came in by one door, and what that returns for `images(3)`.

    exact: at budget 1.0.
    less: at budget 0.75.
    output: of `exact`.
    """

    exact: Optimised
    less: Optimised
    output: Any


def module_door(model: nn.Module) -> Door:
    captured = capture_module(model, call_signature(model, images()))
    exact, less = (run_passes(captured, Options.of(flops_budget=budget)) for budget in (1.0, 0.75))
    return Door(exact, less, exact.graph_module(images(3)))


def dynamo_door(model: nn.Module) -> Door:
    made: list[Optimised] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        captured = capture_dynamo(gm)
        made.extend(run_passes(captured, Options.of(flops_budget=budget)) for budget in (1.0, 0.75))
        return made[0].graph_module

    torch._dynamo.reset()
    output = torch.compile(model, backend=backend)(images(3))
    exact, less = made
    return Door(exact, less, output)
