"""Contenders: a model compiled in one of several ways, by graph, torch.compile's mode and preferred attention kernel.

Each contender has a backend of its own, so that Dynamo shares nothing between them. The code that Inductor generates
for it is kept, because it shows which attention kernel the contender actually calls.
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
from gtp_fx.targets.target import SCALE_FORMS

ATTENTION: Mapping[str, list[SDPBackend]] = {
    "cudnn": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
"""Kernels that torch may use, in order of preference. Where flash attention can't be used (masks), the others are."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "regeneration": {"strategy": "regeneration"},
    "spatial": {"strategy": GTP(graph="spatial")},
    "untold": {"strategy": GTP(token_scale=False)},
    **{f"told{form}": {"strategy": GTP(token_scale=True), "scale_form": form} for form in SCALE_FORMS},
    "nokernels": {"disabled_passes": ("triton_kernels",)},
    "border": {},
    "all": {"strategy": GTP(graph="spatial", token_scale=False)},
}
"""Options of the backend. "scale_form" is an option of the target: the form in which token scales enter attention.
"border" and "all" also use the net's schedule with one site at a tile's border."""
AT_BORDER = ("border", "all")


@dataclass(frozen=True)
class Contender:
    """One way to compile a model.

    ours: whether it is the optimised graph, or the original.
    mode: torch.compile's mode.
    attention: a name in `ATTENTION`.
    option: a name in `gpu_plan.OPTIONS`, or "".
    variant: a name in `VARIANTS`, or "".
    """

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
"""Originals that all have to run before one of them is called the best."""


@dataclass(frozen=True)
class Compiled:
    """A compiled contender.

    run: runs it on its images.
    code: code that Inductor generated; filled by the first run.
    """

    run: Run
    code: list[str]

    @property
    def attention(self) -> dict[str, int]:
        """Return the number of attention calls in the generated code: torch's by kernel, and launches of GTP's."""
        text = "\n".join(self.code)
        stock = re.findall(
            r"= torch\.ops\.aten\._scaled_dot_product_(\w+?)(?:_attention)?(?:_for_cpu)?\.default\(", text
        )
        ours = re.findall(r"\b(attend|scores)_kernel\w*\.run\(", text)
        return dict(Counter([*stock, *ours]))


def compiled(
    contender: Contender, model: nn.Module, images: torch.Tensor, options: Mapping[str, Any], target: Target
) -> Compiled:
    """Return the compiled contender. The first run compiles.

    options: options of the backend, for an optimised graph.

    Raises OptionError for an option that Inductor doesn't have.
    """
    more = OPTIONS[contender.option] if contender.option else {}
    scale_form = options.get("scale_form", target.scale_form)
    given = {name: value for name, value in options.items() if name != "scale_form"}
    ours = replace(target, inductor={**target.inductor, **more}, scale_form=scale_form)
    original = replace(target, inductor=more)  # the target's own options apply to the optimised graph only
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
    """Append the code that Inductor generates, or takes from its cache, within the context."""
    with mock.patch.object(GraphLowering, "save_output_code", staticmethod(code.append)):
        yield
