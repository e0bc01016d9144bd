"""NVIDIA GeForce RTX 4090."""

from gtp_fx.targets.shared_figures import (
    AMPERE_TILE_SOURCE,
    AMPERE_TILES,
    FLASH_TILES,
    UNMEASURED_CURVES,
    UNMEASURED_SOURCES,
    counted_curves,
)
from gtp_fx.targets.target import Curve, Target

RTX4090 = Target(
    name="rtx4090",
    device="cuda",
    devices=("NVIDIA GeForce RTX 4090",),
    dense={"bfloat16": 165.2e12, "float16": 165.2e12, "float32": 82.6e12},
    bandwidth=1.008e12,
    launch=1.0e-6,
    units=128,
    tiles=AMPERE_TILES,
    attention_tile=(128, 128),
    curves={
        "product": Curve(((1e9, 0.92),)),
        "convolution": Curve(((1e9, 0.92),)),
        "attention": Curve(((512, 0.55),)),
        "stream": Curve(((1e6, 0.91),)),
        **UNMEASURED_CURVES,
        **counted_curves(128, 2.52e9, 1.008e12),
    },
    sources={
        "dense": "clock 2.52 GHz x 128 multiprocessors x 512 FLOP with float32 accumulation, no sparsity; "
        "82.6 TFLOP/s fp32",
        "bandwidth": "data sheet: 1008 GB/s",
        "launch": "assumed: as published for L40, of the same generation (RRZE-HPC/gpu-benches)",
        "units": "device property: 128 multiprocessors",
        "tiles": AMPERE_TILE_SOURCE,
        "attention_tile": FLASH_TILES,
        "curves.product": "published: 0.92 to 0.97 of the dense rate (torch.matmul, one user's run)",
        "curves.convolution": "assumed as products'",
        "curves.attention": "assumed: 0.6 of what products reach",
        "curves.stream": "published: reads at 0.914 of the data sheet's rate (krrishnarraj/clpeak)",
        **UNMEASURED_SOURCES,
    },
)
