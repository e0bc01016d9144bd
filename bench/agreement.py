"""Do a token's neighbours in the graph look like it, and how deep down? A free signal for how far to propagate, and how much.

Local-GCL (arXiv 2212.04604) takes the neighbours of a node for its positives, since neighbours tend to share a label. Where that holds of
a token graph, what a token passes to its neighbours is what they hold already; where it doesn't, it is noise to them. The graph is
built once, from the first block's input, so agreement also says whether it is still good at a depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.analysis.blocks import AttentionBlock
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.errors import UnsupportedModelError
from gtp_fx.graph.edit import returning
from gtp_fx.model.pipeline import run_exact_passes
from gtp_fx.options.calibration import Calibration, bound
from gtp_fx.options.options import Options
from gtp_fx.strategies import GTP

COUNTS = (4, 8, 16, 32)
"""M's that are looked at, as far as there are patches."""
_KEPT = 0.8
"""What part of the nearest neighbours' agreement farther ones must have to be taken as well."""
_MOST_ALPHA = 0.4
"""The largest of the paper's alphas: for neighbours that agree wholly."""


@dataclass(frozen=True)
class Agreement:
    """by_block[b][i]: of attention block b's stream behind its attention, the mean cosine of a token and its counts[i] semantic neighbours,
    after the mean of all tokens is taken away: 0 is chance, 1 is equality. spatial[b]: the same of the eight around it."""

    counts: tuple[int, ...]
    blocks: tuple[int, ...]
    by_block: tuple[tuple[float, ...], ...]
    spatial: tuple[float, ...]

    def proposed(self, strategy: GTP | None = None) -> GTP:
        """GTP with the most neighbours that agree nearly as well as the nearest do, and as much alpha as they agree."""
        means = [sum(row[i] for row in self.by_block) / len(self.by_block) for i in range(len(self.counts))]
        good = [i for i, mean in enumerate(means) if mean >= _KEPT * means[0]]
        chosen = max(good, default=0)
        alpha = round(_MOST_ALPHA * max(0.0, means[chosen]), 3)
        return replace(strategy or GTP(), neighbors=self.counts[chosen], alpha=alpha)

    def __str__(self) -> str:
        rows = [
            [block, *(f"{value:.3f}" for value in (*row, near))]
            for block, row, near in zip(self.blocks, self.by_block, self.spatial, strict=True)
        ]
        headers = ["block", *(f"M={count}" for count in self.counts), "touching"]
        return tabulate(rows, headers, disable_numparse=True)


def neighbour_agreement(model: nn.Module, images: Any, example_inputs: Any = None) -> Agreement:
    """Of `model`'s first stream of tokens, on some dozens of unlabelled images as `calibration=` takes them; eager.

    Raises UnsupportedModelError where no tokens can leave, so that there is no graph to speak of.
    """
    calibration = Calibration.of(images)
    batch = calibration.batches()[0]
    signature = call_signature(model, example_inputs if example_inputs is not None else batch)
    captured = capture_module(model, signature)
    gm = run_exact_passes(captured, Options.of(flops_budget=1.0)).graph_module
    blocks = _of_first_stream(gm)
    runner = returning(gm, lambda copies: [copies[node] for node in _streams(blocks)])
    axis = blocks[0].axis
    counts = tuple(count for count in COUNTS if count < axis.domain.whole_count)
    sums: list[Tensor] = []
    with torch.no_grad():
        for args, kwargs in bound(calibration, signature.canonical).images:
            values = [x[:, axis.prefix :][:, : axis.domain.whole_count] for x in runner(*args, **kwargs)]
            sums.append(_agreement(values[0], values[1:], list(axis.domain.grid.shape), counts))
    by_block = torch.cat(sums).mean(dim=0)
    return Agreement(
        counts,
        tuple(block.index for block in blocks),
        tuple(tuple(row[:-1]) for row in by_block.tolist()),
        tuple(by_block[:, -1].tolist()),
    )


def _of_first_stream(gm: fx.GraphModule) -> list[AttentionBlock]:
    blocks = [block for block in typed_graph(gm.graph).blocks if block.refusal is None and block.site is not None]
    if not blocks or blocks[0].stream is None:
        raise UnsupportedModelError("no tokens can leave this model's streams, so no graph of them is asked")
    return [block for block in blocks if block.axis.domain.grid == blocks[0].axis.domain.grid]


def _streams(blocks: Sequence[AttentionBlock]) -> list[fx.Node]:
    """What enters the first block, and the stream behind each one's attention."""
    assert blocks[0].stream is not None
    return [blocks[0].stream, *(block.site for block in blocks if block.site is not None)]


def _agreement(first_BGC: Tensor, later: Sequence[Tensor], grid: list[int], counts: Sequence[int]) -> Tensor:
    """[B, blocks, counts + 1]; the last of the touching ones."""
    near_BGM, _ = gtp_fx.token_graph(first_BGC, grid, 0, "semantic", max(counts))
    # `token_graph` gives the nearest in no order: order them.
    unit_BGC = F.normalize(first_BGC.float(), dim=-1)
    likeness_BGM = (unit_BGC @ unit_BGC.transpose(1, 2)).gather(2, near_BGM)
    near_BGM = near_BGM.gather(2, likeness_BGM.argsort(dim=2, descending=True))
    everyone = torch.arange(first_BGC.shape[1]).expand(first_BGC.shape[0], -1)
    flat = torch.zeros(first_BGC.shape[0], first_BGC.shape[1], 0, dtype=torch.int64)
    ones = torch.ones(first_BGC.shape[:2])
    touching_BGG = gtp_fx.propagation_weights(flat, ones, everyone, everyone, grid, "spatial")
    found = []
    for x_BGC in later:
        unit_BGC = F.normalize(x_BGC.float() - x_BGC.float().mean(dim=1, keepdim=True), dim=-1)
        cosine_BGG = unit_BGC @ unit_BGC.transpose(1, 2)
        near = cosine_BGG.gather(2, near_BGM)
        means = [near[..., :count].mean(dim=(1, 2)) for count in counts]
        means.append((cosine_BGG * touching_BGG).sum(dim=(1, 2)) / touching_BGG.sum(dim=(1, 2)))
        found.append(torch.stack(means, dim=1))
    return torch.stack(found, dim=1)
