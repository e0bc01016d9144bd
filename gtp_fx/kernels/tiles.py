"""Tiles that a kernel's work is cut into: rows and columns of a program, and the warps that share it."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import torch

from gtp_fx.errors import OptionError

ROW_FITS = 128
"""Largest number of keys in one tile. Hopper's tensor cores need 64 queries, and with 256 keys registers spill."""


@dataclass(frozen=True)
class AttentionTile:
    """Tile of an attention kernel. Raises OptionError for sizes that the kernels don't support.

    rows: queries of a program.
    columns: keys that it reads at once. With all keys in one tile no loop is needed.
    warps: Triton's number of warps.
    stages: Triton's number of pipeline stages.
    """

    rows: int
    columns: int
    warps: int = 4
    stages: int = 2

    def __post_init__(self) -> None:
        if any(size < 16 or size & (size - 1) for size in (self.rows, self.columns)):
            raise OptionError(f"{self}: rows and columns must be powers of two of at least 16")
        if self.warps not in (1, 2, 4, 8, 16) or self.stages < 1:
            raise OptionError(f"{self}: warps must be 1, 2, 4, 8 or 16, and stages at least 1")

    @property
    def arguments(self) -> list[int]:
        """Return the fields as an operator's `tile`: `AttentionTile(*tile.arguments)` equals the tile."""
        return list(astuple(self))


def attention_tiles(keys: int, head: int, dtype: torch.dtype) -> tuple[AttentionTile, ...]:
    """Return the tiles worth timing for a number of keys and a head size, first the one to take untimed.

    All compile without spilling registers and with less shared memory than any GPU from Ampere on has (99 KiB).
    """
    columns, wide = power_of_two(keys), head > 64
    if dtype == torch.float32:  # without TF32 there are no tensor cores, and operands are in registers
        return (AttentionTile(32, 32, 8, 1),) if wide else (AttentionTile(64, min(columns, 32), 8, 1),)
    # Hopper's tensor cores need 64 rows, and its registers hold three such tiles of 4 warps per multiprocessor.
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
    """Return the tile of `scores_kernel`: keys that a program scores, as rows, and queries that it reads at once.

    Both operands and the sums stay in registers.
    """
    if dtype == torch.float32:
        return AttentionTile(16, 32, 4, 1)
    return AttentionTile(64, 64, 4, 2)


_CHANNELS_OF_A_WARP = 1_024
_MOST_WARPS = 8


@dataclass(frozen=True)
class PropagationTile:
    """Tile of the propagation kernel. Raises OptionError for sizes that it doesn't support.

    rows: rows of the shorter stream that a program makes, each with all channels.
    warps: Triton's number of warps, which share the rows.
    """

    rows: int
    warps: int = 1

    def __post_init__(self) -> None:
        if self.rows not in (1, 2, 4, 8, 16) or self.warps not in (1, 2, 4, _MOST_WARPS):
            raise OptionError(f"{self}: rows must be 1, 2, 4, 8 or 16, and warps 1, 2, 4 or {_MOST_WARPS}")

    @property
    def arguments(self) -> list[int]:
        """Return the fields as an operator's `tile`: `PropagationTile(*tile.arguments)` equals the tile."""
        return list(astuple(self))


def propagation_tiles(channels: int) -> tuple[PropagationTile, ...]:
    """Return the tiles worth timing for a stream of `channels`, first the one to take untimed.

    One warp per row needs no barrier: candidates, sums and norm stay within the warp. It holds 1024 channels of the
    stream and of what they receive. Two rows in one warp, even of few channels, spill with some compilers; none of
    these tiles does in half precision.
    """
    warps = max(1, power_of_two(channels) // _CHANNELS_OF_A_WARP)
    if warps > 1:
        return tuple(PropagationTile(1, count) for count in sorted({warps, min(2 * warps, _MOST_WARPS)}))
    return PropagationTile(1, 1), PropagationTile(1, 2), PropagationTile(2, 4)


def power_of_two(size: int) -> int:
    """Return the least power of two from `size` on, at least 16: tensor cores take no smaller operand."""
    return max(16, 1 << (size - 1).bit_length())


@dataclass(frozen=True)
class GraphTile:
    """Tile of the token graph's kernel.

    rows: cells whose neighbours a program finds.
    columns: cells that it compares them with at once.
    channels: channels that it reads at once.
    warps: Triton's number of warps.
    stages: Triton's number of pipeline stages.
    """

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int


_GRAPH = GraphTile(64, 64, 64, 4, 3)
_GRAPH_LARGE = GraphTile(128, 64, 64, 8, 3)
"""Tile for many cells: reads a quarter less, which is worth its unused rows then."""
_GRAPH_OF_FEW = GraphTile(16, 256, 32, 8, 5)
"""Tile for few cells: more and shorter programs, where a large GPU's multiprocessors would have at most one each."""
_GRAPH_SINGLE = GraphTile(64, 64, 16, 8, 1)


def graph_tile(images: int, cells: int, dtype: torch.dtype) -> GraphTile:
    """Return the tile for `cells` cells in each of `images` images.

    images: may be a symbolic size, which is not looked at, so that no guard is added.

    All compile with less than 99 KiB of shared memory. Registers spill in two cases only: for channels that are no
    multiple of 16, which can't be read 16 bytes at a time, and for more than 16 neighbours, where a register or two are
    spilled outside loops.
    """
    tile = _GRAPH if cells <= 512 else _GRAPH_LARGE
    if isinstance(images, int) and images * cells <= 128 * _GRAPH.rows:
        tile = _GRAPH_OF_FEW
    if dtype == torch.float32:
        tile = _GRAPH_SINGLE
    size = power_of_two(cells)
    return replace(tile, rows=min(tile.rows, size), columns=min(tile.columns, size))
