"""Agreement of a token with its neighbours in the token graph, at each depth: a label-free signal for M and alpha.

Local-GCL (arXiv 2212.04604) uses a node's neighbours as its positives, since neighbours tend to share a label. Where
this holds for a token graph, a removed token propagates what its neighbours hold already; where it doesn't, it
propagates noise. The graph is built once, from the first block's input, so agreement also shows whether it is still
good at greater depth.
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
"""Values of M to measure, as far as there are patches."""
_KEPT = 0.8
"""Least agreement of more neighbours, as a share of the nearest ones', for M to include them."""
_MOST_ALPHA = 0.4
"""The largest alpha in the paper, for neighbours that agree fully."""


@dataclass(frozen=True)
class Agreement:
    """Mean cosine similarity of a token and its neighbours, in the stream after each block's attention.

    The mean of all tokens is subtracted first, so that 0 is chance level and 1 is equality.

    counts: values of M.
    blocks: indices of the attention blocks.
    by_block: similarity to the counts[i] semantic neighbours at block b is by_block[b][i].
    spatial: similarity to the eight surrounding tokens, by block.
    """

    counts: tuple[int, ...]
    blocks: tuple[int, ...]
    by_block: tuple[tuple[float, ...], ...]
    spatial: tuple[float, ...]

    def proposed(self, strategy: GTP | None = None) -> GTP:
        """Return `strategy` with M and alpha chosen by agreement.

        M is the largest count whose mean agreement is at least `_KEPT` times that of the smallest. alpha is
        `_MOST_ALPHA` times the agreement at M.
        """
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
    """Measure agreement in `model`'s first token stream, eager.

    images: some dozens of unlabelled images, as `calibration=` takes them.
    example_inputs: inputs to capture the model with; the first batch of images where None.

    Raises UnsupportedModelError where no tokens can be removed, so that there is no token graph.
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
    """Return the blocks on the first block's grid. Raises UnsupportedModelError where no tokens can be removed."""
    blocks = [block for block in typed_graph(gm.graph).blocks if block.refusal is None and block.site is not None]
    if not blocks or blocks[0].stream is None:
        raise UnsupportedModelError("no tokens can be removed from this model's streams, so it has no token graph")
    return [block for block in blocks if block.axis.domain.grid == blocks[0].axis.domain.grid]


def _streams(blocks: Sequence[AttentionBlock]) -> list[fx.Node]:
    """Return the first block's input, followed by the stream after each block's attention."""
    assert blocks[0].stream is not None
    return [blocks[0].stream, *(block.site for block in blocks if block.site is not None)]


def _agreement(first_BGC: Tensor, later: Sequence[Tensor], grid: list[int], counts: Sequence[int]) -> Tensor:
    """Return the mean cosines [B, blocks, counts + 1]; the last column is that of the eight surrounding tokens.

    first_BGC: patches of the first block's input, from which the graph is built.
    later: patches [B, G, C] of the stream after each block's attention.
    """
    near_BGM, _ = gtp_fx.token_graph(first_BGC, grid, 0, "semantic", max(counts))
    # `token_graph` returns the nearest tokens unordered, so sort them by similarity.
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
