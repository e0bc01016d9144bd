"""Seconds that a launch is modelled to take on an H100: MODELLED, NOT MEASURED. Nothing here has seen a GPU.

A launch takes what launching costs and then the longer of moving its bytes and computing. Good for comparing launches
of one kind, and for which of them are worth work; a sum over a model is good to some 20 %, topk to 50 %.
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
    """Each figure with where it comes from; rates are per second and of the whole GPU where nothing else is said."""

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
    """Of `dense` that a whole tile reaches with at most `short` terms a sum, and with more. Assumed: published large
    products reach 0.70 to 0.80."""
    short: int = 512
    single_share: float = 0.7
    """Of `single`. Assumed."""
    tiles: tuple[Tile, ...] = H100.tiles
    """Of a product, of which the library takes the fastest: the target's, with its source."""
    single_tile: Tile = _SINGLE_TILE
    """Of a float32 product. Assumed."""
    attention: float = 400e12
    """FLOP/s of cuDNN's attention, heads of 64, in whole tiles. Assumed: published is 285 to 320 of flash, more
    of cuDNN."""
    attention_tile: tuple[int, int] = (128, 128)
    """Queries and keys. Published of flash, assumed of cuDNN."""
    issue: int = 128
    """Threads whose next instruction a multiprocessor issues in a cycle: four schedulers of 32."""
    stall: float = 1.3
    """By how much a kernel of ours takes longer than its instructions take to issue. Assumed."""
    fitting: tuple[float, float, float] = (15.3, -0.5, 11.1)
    """`attend` where a row fits its tile: a thread's instructions for an entry of the map, and how many more where it
    is told scales, whose logarithms also mask what is behind the last key, and where it scores. Counted in the code
    that Triton 3.8 makes of these kernels for sm_90, tile (64, 128) of 4 warps: 976, 944, 1688, 1624 a warp."""
    looping: tuple[float, float] = (10.3, 1.3)
    """The same where it takes the keys in turns, and told; scoring is `scores_kernel`'s. Counted: 331 and 372 a turn,
    tile (64, 64) of 4 warps."""
    exponentials: int = 16
    """That a multiprocessor makes in a cycle: CUDA's programming guide, throughput of special functions. It bounds
    `attention_scores`."""
    graph_share: float = 0.65
    """Of `dense`, of the graph kernel's product. Assumed: as other products of a few hundred terms."""
    graph_select: float = 11.0
    """A thread's instructions for an entry and neighbour: a round of the largest. Assumed, of as many rounds as
    neighbours in every tile; a kernel that goes by what may still enter has fewer."""
    digits: int = 17
    pass_cycles: float = 1000.0
    """aten.topk of float32: 16 passes of two bits over a row and one that gathers (ATen's SortingRadixSelect.cuh), and
    what one takes, with its barriers. Assumed."""
    threads: int = 2048
    """A multiprocessor holds: device property. topk's block has a thread for each entry of a row, at most 1024."""
    select: float = 4e-6
    """Seconds of an image's 32 counts one after another. Assumed: 0.12 us each."""
    gather_share: float = 0.7
    """Of `bandwidth`, of kernels that read rows by indices just read, and reduce across warps between. Assumed."""

    def seconds(self, launch: Launch) -> float:
        """Of one launch."""
        share = self.gather_share if isinstance(launch.work, Gather) else 1.0
        return self.launch + max(launch.bytes / (self.bandwidth * share), self.computing(launch.work))

    @singledispatchmethod
    def computing(self, work: Work) -> float:
        """Seconds of the work itself, its operands at hand; 0 where memory is all that counts."""
        return 0.0

    @computing.register
    def _(self, work: Product) -> float:
        """In whole waves of whole tiles; of the tiles that there are, those that are done first."""
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
        """Of all maps in whole tiles, and of as many maps' rows of tiles as there are multiprocessors at least, since
        each takes as long."""
        rows, columns = tile
        programs = work.maps * math.ceil(work.queries / rows)
        return max(programs, self.units) * rows * _whole(work.keys, columns)


def _whole(size: int, step: int) -> int:
    return math.ceil(size / step) * step
