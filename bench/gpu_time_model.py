"""Model of the seconds that a launch takes on an H100: MODELLED, NOT MEASURED. Nothing here was run on a GPU.

A launch takes a fixed cost plus the longer of moving its bytes and computing. The model is good for comparing launches
of one kind, and for finding those worth improving. A sum over a model is good to some 20 %, topk to 50 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatchmethod

from bench.gpu_work import (
    Attention,
    Gather,
    Product,
    Scores,
    Select,
    TokenGraph,
    TopK,
    TritonAttention,
    Work,
)
from bench.launches import Launch
from gtp_fx.targets.h100 import H100
from gtp_fx.targets.target import Tile

_SINGLE_TILE = Tile(128, 128)


@dataclass(frozen=True)
class GpuModel:
    """Figures of the model, each with its source. Rates are per second and for the whole GPU unless stated."""

    units: int = H100.units
    """Multiprocessors: device property."""
    clock: float = 1.75e9
    """Hz under load. Assumed: between base and boost."""
    bandwidth: float = 2.8e12
    """Bytes. Assumed: 0.84 of the data sheet's; published copies and stencils reach 0.77 to 0.80, on smaller arrays."""
    launch: float = 2e-6
    """Seconds from one kernel to the next. Assumed: published is 1.3 us in a CUDA graph, up to twice that without."""
    dense: float = H100.dense["bfloat16"]
    single: float = H100.dense["float32"]
    """FLOP/s of products: data sheet. Of float32 without tensor cores, since torch leaves TF32 off."""
    product_share: tuple[float, float] = (0.62, 0.70)
    """Shares of `dense` that a whole tile reaches with at most `short` terms per sum, and with more. Assumed: published
    large products reach 0.70 to 0.80."""
    short: int = 512
    single_share: float = 0.7
    """Share of `single` that a product reaches. Assumed."""
    tiles: tuple[Tile, ...] = H100.tiles
    """Tiles of a product, of which the library uses the fastest: the target's, with its source."""
    single_tile: Tile = _SINGLE_TILE
    """Tile of a float32 product. Assumed."""
    attention: float = 400e12
    """FLOP/s of cuDNN's attention with 64 features per head, in whole tiles. Assumed: published is 285e12 to 320e12 for
    flash attention, and more for cuDNN's."""
    attention_tile: tuple[int, int] = (128, 128)
    """Queries and keys of a tile. Published for flash attention, assumed for cuDNN's."""
    issue: int = 128
    """Threads whose next instruction a multiprocessor issues in a cycle: four schedulers of 32."""
    stall: float = 1.3
    """Time of one of GTP's kernels / time to issue its instructions. Assumed."""
    fitting: tuple[float, float, float] = (15.3, -0.5, 11.1)
    """Instructions per thread and entry of the map, in `attend` where a row fits its tile; how many more with token
    scales, whose logarithms also mask what is after the last key; and how many more with scores. Counted in the code
    that Triton 3.8 generates for sm_90, tile (64, 128) with 4 warps: 976, 944, 1688 and 1624 per warp."""
    looping: tuple[float, float] = (10.3, 1.3)
    """The same where `attend` loops over the keys, without scores, which `scores_kernel` computes. Counted: 331 and 372
    per iteration, tile (64, 64) with 4 warps."""
    exponentials: int = 16
    """Exponentials per cycle and multiprocessor: CUDA's programming guide, throughput of special functions. They bound
    `attention_scores`."""
    graph_share: float = 0.65
    """Share of `dense` that the graph kernel's product reaches. Assumed: as other products of a few hundred terms."""
    graph_select: float = 11.0
    """Instructions per thread, entry and neighbour, for one round that finds the largest. Assumed, with as many rounds
    as neighbours in every tile. A kernel that skips entries too small to be selected needs fewer."""
    digits: int = 17
    pass_cycles: float = 1000.0
    """Passes of aten.topk in float32, and cycles per pass with its barriers. There are 16 passes of two bits over a row
    and one that gathers (ATen's SortingRadixSelect.cuh). The cycles are assumed."""
    threads: int = 2048
    """Threads that a multiprocessor holds: device property. topk's block has one per entry of a row, at most 1024."""
    select: float = 4e-6
    """Seconds of an image's 32 counts, one after the other. Assumed: 0.12 us each."""
    gather_share: float = 0.7
    """Share of `bandwidth` of kernels that read rows by indices just read, and reduce across warps. Assumed."""

    def seconds(self, launch: Launch) -> float:
        """Return the modelled time of one launch, in seconds."""
        share = self.gather_share if isinstance(launch.work, Gather) else 1.0
        return self.launch + max(launch.bytes / (self.bandwidth * share), self.computing(launch.work))

    @singledispatchmethod
    def computing(self, work: Work) -> float:
        """Return the seconds of the computation alone; 0 where only memory counts."""
        return 0.0

    @computing.register
    def _(self, work: Product) -> float:
        """Return the time of a product in whole waves of whole tiles, with the fastest of the tiles."""
        if work.single:
            return self._waves(work, self.single_tile, self.single * self.single_share)
        rate = self.dense * self.product_share[work.inner > self.short]
        return min(self._waves(work, tile, rate * tile.share) for tile in self.tiles)

    def _waves(self, work: Product, tile: Tile, rate: float) -> float:
        tiles = work.batch * math.ceil(work.rows / tile.rows) * math.ceil(work.columns / tile.columns)
        return math.ceil(tiles / self.units) * 2 * tile.rows * tile.columns * work.inner * self.units / rate

    @computing.register
    def _(self, work: Attention) -> float:
        entries = self._entries(work, self.attention_tile)
        return entries * 2 * (work.features + work.values) / self.attention

    @computing.register
    def _(self, work: TritonAttention) -> float:
        if work.fits:
            each, telling, scoring = self.fitting
            instructions = each + telling * work.told + scoring * work.scored
        else:
            instructions = self.looping[0] + self.looping[1] * work.told
        return self._issued(work, (work.rows, work.columns), instructions)

    @computing.register
    def _(self, work: Scores) -> float:
        exponentials = work.maps * _whole(work.keys, work.rows) * _whole(work.queries, work.columns)
        return exponentials / (self.exponentials * self.units * self.clock)

    @computing.register
    def _(self, work: TokenGraph) -> float:
        entries = work.images * _whole(work.cells, work.rows) * _whole(work.cells, work.columns)
        chosen = entries * work.neighbors * self.graph_select / (self.issue * self.units * self.clock)
        return chosen + entries * 2 * work.channels / (self.dense * self.graph_share)

    @computing.register
    def _(self, work: TopK) -> float:
        block = min(_whole(work.size, 32), 1024)
        return work.rows * self.digits * self.pass_cycles * block / (self.threads * self.units * self.clock)

    @computing.register
    def _(self, work: Select) -> float:
        return self.select

    def _issued(self, work: Attention, tile: tuple[int, int], instructions: float) -> float:
        return self._entries(work, tile) * instructions * self.stall / (self.issue * self.units * self.clock)

    def _entries(self, work: Attention, tile: tuple[int, int]) -> int:
        """Return the entries of all maps in whole tiles.

        At least as many rows of tiles count as there are multiprocessors, since idle ones save no time.
        """
        rows, columns = tile
        programs = work.maps * math.ceil(work.queries / rows)
        return max(programs, self.units) * rows * _whole(work.keys, columns)


def _whole(size: int, step: int) -> int:
    return math.ceil(size / step) * step
