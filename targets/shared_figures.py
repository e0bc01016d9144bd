"""Figures that several processors share: their sources, and curves that nobody has measured yet."""

from gtp_fx.targets.target import Curve, Tile

GRAPH_LAUNCHES = (
    "published: time of chains of small kernels in a CUDA graph, extrapolated to empty ones (RRZE-HPC/gpu-benches, "
    "gpu-small-kernels); without CUDA graphs about twice that"
)
"""Source of the time from one kernel to the next."""
_SMALLER = (Tile(128, 128, 0.85), Tile(64, 128, 0.7), Tile(64, 64, 0.5))
HOPPER_TILES = (Tile(128, 256), *_SMALLER)
HOPPER_TILE_SOURCE = (
    "published traces: cuBLAS kernels named nvjet_*_128x256_64x4 for large products, 64x64 for small ones; what "
    "smaller tiles reach is assumed"
)
AMPERE_TILES = (Tile(256, 128), *_SMALLER)
AMPERE_TILE_SOURCE = (
    "published traces: cuBLAS kernels of 256x128 for large products, 128x128 for middling, 64x64 for small ones; what "
    "smaller tiles reach is assumed"
)
FLASH_TILES = "FlashAttention-2 at head size 64 (csrc/flash_attn/src/flash_fwd_launch_template.h), in torch's SDPA too"

UNMEASURED_CURVES = {
    "gather": Curve(((1e6, 0.5),)),
    "sort": Curve(((1e4, 0.001), (1e7, 0.05))),
}
"""Curves of kinds of work that no publication times; `gtp-fx tune` measures them on the machine it runs on."""

UNMEASURED_SOURCES = {
    **{f"curves.{kind}": "assumed, not measured: run `gtp-fx tune`" for kind in UNMEASURED_CURVES},
    "curves.scores": "counted, not measured: 16 exponentials a cycle and multiprocessor (CUDA C++ Programming Guide, "
    "arithmetic instructions), of which 0.8 are assumed to be reached; run `gtp-fx tune`",
    "curves.neighbors": "counted, not measured: some 12 instructions a comparison at 128 a cycle and multiprocessor; "
    "run `gtp-fx tune`",
}

_BYTES = 4
"""Bytes of an entry, in which works of these kinds are counted."""


def counted_curves(units: int, clock: float, bandwidth: float) -> dict[str, Curve]:
    """Return the curves of work that is bound by instructions, as shares of the bandwidth.

    units: multiprocessors.
    clock: cycles/s at which the dense rate is reached.
    bandwidth: bytes/s.
    """
    exponentials, comparisons = 0.8 * 16 * units * clock, 128 / 12 * units * clock
    rates = {"scores": exponentials, "neighbors": comparisons}
    return {kind: Curve(((1e6, _BYTES * rate / bandwidth),)) for kind, rate in rates.items()}
