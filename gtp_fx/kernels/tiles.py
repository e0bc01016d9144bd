"""How a kernel's work is cut: tiles of rows and columns, and the warps that share one."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import torch

from gtp_fx.errors import OptionError

ROW_FITS = 128
"""Keys that one tile may hold: 64 queries, as many as Hopper's tensor cores want, x 256 keys would spill registers."""


@dataclass(frozen=True)
class AttentionTile:
    """rows: queries of a program. columns: keys that it looks at once; where they are all keys it looks once.

    warps, stages: Triton's. `AttentionTile(*tile.arguments)` is the tile again.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        if any(size < 16 or size & (size - 1) for size in (self.rows, self.columns)):
            raise OptionError(f"{self}: rows and columns are powers of two of at least 16")
        if self.warps not in (1, 2, 4, 8, 16) or self.stages < 1:
            raise OptionError(f"{self}: warps are 1, 2, 4, 8 or 16, stages at least 1")

    @property
    def arguments(self) -> list[int]:
        return list(astuple(self))


def attention_tiles(keys: int, head: int, dtype: torch.dtype) -> tuple[AttentionTile, ...]:
    """What is worth timing for so many keys and such a head size; the one that is taken untimed first.

    All are compiled without spilling registers and in less shared memory than any GPU from Ampere on has (99 KiB).
    """
    columns, wide = power_of_two(keys), head > 64
    if dtype == torch.float32:  # without TF32 there are no tensor cores, and operands are in registers
        return (AttentionTile(32, 32, 8, 1),) if wide else (AttentionTile(64, min(columns, 32), 8, 1),)
    # Hopper's tensor cores want 64 rows, and three such tiles of 4 warps share a multiprocessor of its, by their registers.
    tiled = AttentionTile(64, 64, 4, 2)
    if keys > ROW_FITS:
        larger = AttentionTile(128, 64, 8, 2 if wide else 3)
        return (larger, tiled) if wide else (tiled, larger, AttentionTile(64, 32, 4, 4))
    shapes = [(64, 4), (64, 8), (32, 4), (32, 8)]
    if wide and columns > 64:
        shapes.remove((64, 4))  # spills on Ampere
    fitting = tuple(AttentionTile(rows, columns, warps, 1) for rows, warps in shapes)
    return fitting if columns <= 64 else (*fitting, tiled)


def score_tile(head: int, dtype: torch.dtype) -> AttentionTile:
    """Keys that a program scores, as rows, and queries that it looks at once: both operands and the sums stay in registers."""
    if dtype == torch.float32:
        return AttentionTile(16, 32, 4, 1)
    return AttentionTile(64, 64, 4, 2)


_CHANNELS_OF_A_WARP = 1_024
_MOST_WARPS = 8


@dataclass(frozen=True)
class PropagationTile:
    """rows: of the shorter stream, which a program makes whole. warps: Triton's, which share them.

    `PropagationTile(*tile.arguments)` is the tile again.
    """

    rows: int
    warps: int = 1

    def __post_init__(self) -> None:
        if self.rows not in (1, 2, 4, 8, 16) or self.warps not in (1, 2, 4, _MOST_WARPS):
            raise OptionError(f"{self}: rows are 1, 2, 4, 8 or 16, warps 1, 2, 4 or {_MOST_WARPS}")

    @property
    def arguments(self) -> list[int]:
        return list(astuple(self))


def propagation_tiles(channels: int) -> tuple[PropagationTile, ...]:
    """What is worth timing for a stream of so many channels; the one that is taken untimed first.

    One warp a row needs no barrier: candidates, sums and norm stay within the warp. It holds 1024 channels of the stream and of
    what they receive; two rows, even of few channels, spill with some compilers. None of these does in half precision.
    """
    warps = max(1, power_of_two(channels) // _CHANNELS_OF_A_WARP)
    if warps > 1:
        return tuple(PropagationTile(1, count) for count in sorted({warps, min(2 * warps, _MOST_WARPS)}))
    return PropagationTile(1, 1), PropagationTile(1, 2), PropagationTile(2, 4)


def power_of_two(size: int) -> int:
    """The least one that is at least `size`, and at least 16: tensor cores take no smaller operand."""
    return max(16, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class GraphTile:
    """rows: cells whose neighbours a program finds. columns: cells that it compares them with at once, `channels` at a time.

    warps, stages: Triton's.
    """

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int


_GRAPH = GraphTile(64, 64, 64, 4, 3)
_GRAPH_LARGE = GraphTile(128, 64, 64, 8, 3)
"""Reads a quarter less, and is worth its unused rows where cells are many."""
_GRAPH_OF_FEW = GraphTile(16, 256, 32, 8, 5)
"""More programs, which are done sooner: for where they would leave a large GPU's multiprocessors with one each, or none."""
_GRAPH_SINGLE = GraphTile(64, 64, 16, 8, 1)


def graph_tile(images: int, cells: int, dtype: torch.dtype) -> GraphTile:
    """What finds the neighbours of so many cells. images: may be a symbol, of which nothing is asked.

    All are compiled in less than 99 KiB of shared memory; and without spilling registers, but for channels that are no multiple of
    16, which can't be read 16 bytes at a time, and for more than 16 neighbours, where a register or two are put away outside loops.
    """
    tile = _GRAPH if cells <= 512 else _GRAPH_LARGE
    if isinstance(images, int) and images * cells <= 128 * _GRAPH.rows:
        tile = _GRAPH_OF_FEW
    if dtype == torch.float32:
        tile = _GRAPH_SINGLE
    size = power_of_two(cells)
    return replace(tile, rows=min(tile.rows, size), columns=min(tile.columns, size))
