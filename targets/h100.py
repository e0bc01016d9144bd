"""NVIDIA H100 SXM, 80 GB."""

from gtp_fx.targets.sources import (
    FLASH_TILES,
    HOPPER_TILE_SOURCE,
    HOPPER_TILES,
    UNMEASURED_CURVES,
    UNMEASURED_SOURCES,
)
from gtp_fx.targets.target import Curve, Target

H100 = Target(
    name="h100",
    device="cuda",
    devices=("NVIDIA H100 80GB HBM3",),
    dense={"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 66.9e12},
    bandwidth=3.352e12,
    launch=1.3e-6,
    units=132,
    tiles=HOPPER_TILES,
    attention_tile=(128, 128),
    curves={
        "product": Curve(((1e9, 0.80),)),
        "convolution": Curve(((1e9, 0.80),)),
        "attention": Curve(((512, 0.285), (1024, 0.309), (2048, 0.321))),
        "stream": Curve(((1e6, 0.82),)),
        **UNMEASURED_CURVES,
    },
    sources={
        "dense": "data sheet: 989.4 TFLOP/s bf16 and fp16 without sparsity, 66.9 TFLOP/s fp32",
        "bandwidth": "device property: 3.352 TB/s",
        "launch": "published: 1.3 microseconds a kernel in a CUDA graph (Hazy Research, No Bubbles)",
        "units": "device property: 132 multiprocessors",
        "tiles": HOPPER_TILE_SOURCE,
        "attention_tile": FLASH_TILES,
        "curves.product": "published: 0.803 of the dense rate for the best large products (stas00/ml-engineering, accelerator benchmarks)",
        "curves.convolution": "assumed as products'",
        "curves.attention": "published: FlashAttention-2 forward, head size 64 (Dao-AILab/flash-attention, assets/flash3_fp16_fwd)",
        "curves.stream": "assumed: between published copies at 0.77 and stencils at 0.80 of the data sheet's rate",
        **UNMEASURED_SOURCES,
    },
)
