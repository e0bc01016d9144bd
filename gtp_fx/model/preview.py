"""Preview of what the compiler finds in a model: blocks, their tokens, what can be done at each, what is refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_call
from gtp_fx.errors import Refusal
from gtp_fx.graph.symbols import shape_of
from gtp_fx.model.internal_errors import internal_errors_reported
from gtp_fx.model.pipeline import run_exact_passes
from gtp_fx.options.options import Options
from gtp_fx.report.text import listed, table, wrapped
from gtp_fx.types.places import is_window


@dataclass(frozen=True)
class BlockRow:
    """One attention block.

    block: its number, in graph order.
    layer: the layer that holds its attention.
    grid: sides of the grid it attends over; of a window, where it attends within windows.
    prefix, suffix: tokens before and after the patches.
    heads: heads of its attention.
    head_features: features of a head.
    can: what its tokens can do: "leave", "skip a branch", "dead" (no output needs its patches) or "nothing".
    why: why they can't be removed, as far as known.
    windowed: whether it attends within windows.
    """

    block: int
    layer: str
    grid: tuple[int, ...]
    prefix: int
    suffix: int
    heads: int
    head_features: int
    can: str
    why: str = ""
    windowed: bool = False


_SAID = {
    "leave": ("can leave", "tokens can be removed here, so that all that follows has fewer"),
    "skip a branch": (
        "can skip the MLP",
        "every token stays, for what comes later needs all of them, but some can do without this block's MLP",
    ),
    "dead": ("not needed", "no output depends on patch tokens after this attention; the exact passes drop them"),
    "nothing": ("stay", "tokens neither leave nor skip anything"),
}
"""What is printed of a block's tokens, by `BlockRow.can`: in the table, and below it."""


@dataclass(frozen=True)
class Inspection:
    """Everything the compiler finds in a model.

    inputs: what the model was captured with, "(float32[*, 3, 224, 224])".
    flops: FLOPs per image.
    exact_flops: FLOPs per image after the exact passes.
    blocks: the attention blocks.
    other: attention that isn't self-attention over patches, and why it is left out.
    """

    inputs: str
    flops: int
    exact_flops: int
    blocks: tuple[BlockRow, ...]
    other: tuple[Refusal, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the table that `gtp-fx inspect` prints, and the reasons below it, each with its blocks."""
        rows = [
            [
                r.block,
                r.layer,
                " x ".join(map(str, r.grid)) + " a window" * r.windowed,
                r.prefix + r.suffix,
                f"{r.heads} x {r.head_features}",
                _SAID[r.can][0],
            ]
            for r in self.blocks
        ]
        headers = ["block", "layer", "patches", "others", "heads", "its tokens"]
        reasons: dict[str, list[int]] = {}
        for row in self.blocks:
            if row.why and row.can != "dead":  # which says it all
                reasons.setdefault(row.why, []).append(row.block)
        saved = self.flops - self.exact_flops
        exact = f"{self.exact_flops / self.flops:.4f} of that" if saved else "as many"
        lines = [
            wrapped(f"takes {self.inputs}; {self.flops / 1e9:.3f} GFLOPs per image, {exact} after the exact passes")
        ]
        if rows:
            lines += ["", table(headers, rows, left=range(6), shortened=1), ""]
            found = {row.can for row in self.blocks}
            lines += [wrapped(f"{name}: {meaning}") for can, (name, meaning) in _SAID.items() if can in found]
        else:
            lines += ["", "no self-attention over patch tokens" + " was recognised, but attention" * bool(self.other)]
        explained = [f"block{'s' * (len(of) > 1)} {_ranges(of)}: {why}" for why, of in reasons.items()]
        lines += listed("why no tokens leave:", explained)
        lines += listed("other attention, which stays as it is:", self.other)
        return "\n".join(lines)


def inspect_model(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """Capture `model` and return what `optimize` would work on.

    The model isn't changed, and may be on the meta device.

    example_inputs: as for `optimize`, of one size.

    Raises CaptureError where the graph can't be captured.
    """
    with internal_errors_reported():
        captured, signature = capture_call(model, call_signature(model, example_inputs))
        exact = run_exact_passes(captured, Options.of(flops_budget=1.0))
        typed = typed_graph(exact.graph_module.graph)
        return Inspection(
            inputs=signature.described,
            flops=exact.original.flops,
            exact_flops=exact.steps[-1].flops,
            blocks=tuple(map(_row, typed.blocks)),
            other=typed.unsupported_attention,
        )


def _row(block: AttentionBlock) -> BlockRow:
    """Return a block's row."""
    refusal = block.refusal
    *_, heads, _, features = shape_of(block.attention.args[0])  # type: ignore[arg-type]
    can = "leave"
    if block.dead:
        can = "dead"
    elif refusal is not None:
        can = "skip a branch" if block.branch is not None else "nothing"
    axis = block.axis
    return BlockRow(
        block=block.index,
        layer=block.layer,
        grid=axis.domain.grid.shape,
        prefix=axis.prefix,
        suffix=axis.suffix,
        heads=heads,
        head_features=features,
        can=can,
        why="" if refusal is None else refusal.reason,
        windowed=is_window(axis.domain.grid),
    )


def _ranges(numbers: list[int]) -> str:
    """Write ascending numbers as ranges: 0, 1, 2, 3, 7 gives "0–3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}–{last}" if last > first else str(first) for first, last in runs)
