"""NVIDIA A100 SXM, 80 GB."""

from gtp_fx.targets.shared_figures import (
    AMPERE_TILE_SOURCE,
    AMPERE_TILES,
    FLASH_TILES,
    GRAPH_LAUNCHES,
    UNMEASURED_CURVES,
    UNMEASURED_SOURCES,
    counted_curves,
)
from gtp_fx.targets.target import Curve, Target

A100 = Target(
    name="a100",
    device="cuda",
    devices=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM-80GB"),
    dense={"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12},
    bandwidth=2.039e12,
    launch=1.3e-6,
    units=108,
    tiles=AMPERE_TILES,
    attention_tile=(128, 128),
    curves={
        "product": Curve(((1e9, 0.87),)),
        "convolution": Curve(((1e9, 0.87),)),
        "attention": Curve(((512, 0.55), (1024, 0.59))),
        "stream": Curve(((1e6, 0.85),)),
        **UNMEASURED_CURVES,
        **counted_curves(108, 1.41e9, 2.039e12),
    },
    sources={
        "dense": "data sheet: 312 TFLOP/s bf16 and fp16 without sparsity, 19.5 TFLOP/s fp32",
        "bandwidth": "device property: 2.039 TB/s",
        "launch": GRAPH_LAUNCHES,
        "units": "device property: 108 multiprocessors",
        "tiles": AMPERE_TILE_SOURCE,
        "attention_tile": FLASH_TILES,
        "curves.product": "published: 0.869 of the dense rate for the best large products (stas00/ml-engineering, "
        "accelerator benchmarks)",
        "curves.convolution": "assumed as products'",
        "curves.attention": "assumed: FlashAttention-2's published forward and backward "
        "(assets/flash2_a100_fwd_bwd_benchmark), scaled by what the forward alone takes on H100",
        "curves.stream": "published: 0.85 of the data sheet's rate (RRZE-HPC/gpu-benches, gpu-stream)",
        **UNMEASURED_SOURCES,
    },
)
