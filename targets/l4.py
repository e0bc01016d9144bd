"""NVIDIA L4."""

from gtp_fx.targets.shared_figures import (
    AMPERE_TILE_SOURCE,
    AMPERE_TILES,
    FLASH_TILES,
    UNMEASURED_CURVES,
    UNMEASURED_SOURCES,
    counted_curves,
)
from gtp_fx.targets.target import Curve, Target

L4 = Target(
    name="l4",
    device="cuda",
    devices=("NVIDIA L4",),
    dense={"bfloat16": 121e12, "float16": 121e12, "float32": 30.3e12},
    bandwidth=0.300e12,
    launch=1.0e-6,
    units=58,
    tiles=AMPERE_TILES,
    attention_tile=(128, 128),
    curves={
        "product": Curve(((1e9, 0.50),)),
        "convolution": Curve(((1e9, 0.50),)),
        "attention": Curve(((512, 0.30),)),
        "stream": Curve(((1e6, 0.85),)),
        **UNMEASURED_CURVES,
        **counted_curves(58, 2.04e9, 0.300e12),
    },
    sources={
        "dense": "data sheet: 242 TFLOP/s bf16 and fp16 with sparsity, half of that without; 30.3 TFLOP/s fp32",
        "bandwidth": "data sheet: 300 GB/s",
        "launch": "assumed: as published for L40, of the same generation (RRZE-HPC/gpu-benches)",
        "units": "device property: 58 multiprocessors",
        "tiles": AMPERE_TILE_SOURCE,
        "attention_tile": FLASH_TILES,
        "curves.product": "published: 0.45 to 0.59 of the dense rate, limited by 72 W (torch.matmul, one user's run)",
        "curves.convolution": "assumed as products'",
        "curves.attention": "assumed: 0.6 of what products reach",
        "curves.stream": "assumed: published 0.90 on L40, 0.76 for stencils on L4",
        **UNMEASURED_SOURCES,
    },
)
