"""A model compiled in one of the ways that are held against each other: whose graph, torch.compile's mode, the
attention kernel asked first.

Each contender has a backend of its own, so that Dynamo shares nothing between them, and the code that Inductor
generates for it is kept: it says which attention a contender really calls.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_plan import OPTIONS
from gtp_fx import GTP
from gtp_fx.measure.timing import Run
from gtp_fx.model.backend import gtp
from gtp_fx.options.inductor import check_target, inductor_options
from gtp_fx.targets import Target
from gtp_fx.targets.target import TOLD

ATTENTION: Mapping[str, list[SDPBackend]] = {
    "cudnn": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""Kernels that torch may choose from, the first first. What flash attention doesn't take (masks) goes to the others."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "spatial": {"strategy": GTP(graph="spatial")},
    "untold": {"strategy": GTP(token_scale=False)},
    **{f"told{form}": {"strategy": GTP(token_scale=True), "told": form} for form in TOLD},
    "nokernels": {"disabled_passes": ("triton_kernels",)},
    "border": {},
    "all": {"strategy": GTP(graph="spatial", token_scale=False)},
}
"""Options of the backend, and as "told" the target's: the form in which attention is told scales. "border" and "all"
also take the net's schedule of one site at a tile's border."""
AT_BORDER = ("border", "all")


@dataclass(frozen=True)
class Contender:
    """ours: the optimised graph. mode: torch.compile's. attention: a name in `ATTENTION`. option, variant: names in
    `gpu_plan.OPTIONS` and `VARIANTS`, or none."""

    ours: bool
    mode: str = "default"
    attention: str = "cudnn"
    option: str = ""
    variant: str = ""

    def __str__(self) -> str:
        parts = ["ours" if self.ours else "original", self.mode, self.attention, self.option, self.variant]
        return ", ".join(part for part in parts if part)


MODES = ("default", "max-autotune", "reduce-overhead")
BASELINES = tuple(Contender(False, mode, attention) for mode in MODES for attention in ATTENTION)
"""What a best original is the best of."""


@dataclass(frozen=True)
class Compiled:
    """run: on some images. code: what Inductor made, filled by the first run."""

    run: Run
    code: list[str]

    @property
    def attention(self) -> dict[str, int]:
        """Calls in the generated code: torch's own by kernel, and launches of GTP's."""
        text = "\n".join(self.code)
        stock = re.findall(
            r"= torch\.ops\.aten\._scaled_dot_product_(\w+?)(?:_attention)?(?:_for_cpu)?\.default\(", text
        )
        ours = re.findall(r"\b(attend|scores)_kernel\w*\.run\(", text)
        return dict(Counter([*stock, *ours]))


def compiled(
    contender: Contender, model: nn.Module, images: torch.Tensor, options: Mapping[str, Any], target: Target
) -> Compiled:
    """options: the backend's, of a contender that is ours. Compiles at the first run. Raises OptionError for an
    option that Inductor doesn't have."""
    more = OPTIONS[contender.option] if contender.option else {}
    told = options.get("told", target.told)
    given = {name: value for name, value in options.items() if name != "told"}
    ours = replace(target, inductor={**target.inductor, **more}, told=told)
    original = replace(target, inductor=more)  # what the target likes is for ours
    check_target(ours)
    code: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        with sdpa_kernel(list(ATTENTION[contender.attention]), set_priority=True), _noted(code):
            if contender.ours:
                return gtp(gm, inputs, options={**given, "mode": contender.mode, "target": ours})
            patches = inductor_options(original, contender.mode, images.device)
            return compile_fx(gm, list(inputs), config_patches=patches)

    made: Any = torch.compile(model, backend=backend, dynamic=False)
    return Compiled(lambda: made(images), code)


@contextlib.contextmanager
def _noted(code: list[str]) -> Iterator[None]:
    """What Inductor generates meanwhile, or takes from its cache."""
    with mock.patch.object(GraphLowering, "save_output_code", staticmethod(code.append)):
        yield
