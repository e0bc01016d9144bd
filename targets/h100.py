"""NVIDIA H100 SXM, 80 GB."""

from gtp_fx.targets.shared_figures import (
    FLASH_TILES,
    HOPPER_TILE_SOURCE,
    HOPPER_TILES,
    UNMEASURED_CURVES,
    UNMEASURED_SOURCES,
    counted_curves,
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
        "attention": Curve(((512, 0.40), (1024, 0.43), (2048, 0.45))),
        "stream": Curve(((1e6, 0.82),)),
        **UNMEASURED_CURVES,
        **counted_curves(132, 1.755e9, 3.352e12),
    },
    sources={
        "dense": "data sheet: 989.4 TFLOP/s bf16 and fp16 without sparsity, 66.9 TFLOP/s fp32",
        "bandwidth": "device property: 3.352 TB/s",
        "launch": "published: 1.3 microseconds a kernel in a CUDA graph (Hazy Research, No Bubbles)",
        "units": "device property: 132 multiprocessors",
        "tiles": HOPPER_TILE_SOURCE,
        "attention_tile": FLASH_TILES,
        "curves.product": "published: 0.803 of the dense rate for the best large products (stas00/ml-engineering, "
        "accelerator benchmarks)",
        "curves.convolution": "assumed as products'",
        "curves.attention": "assumed: 1.4 times FlashAttention-2's published forward at head size 64 "
        "(Dao-AILab/flash-attention, assets/flash3_fp16_fwd), since torch takes cuDNN's attention there, for which "
        "users publish 1.7 to 2.3 times (huggingface/transformers#48163)",
        "curves.stream": "assumed: between published copies at 0.77 and stencils at 0.80 of the data sheet's rate",
        **UNMEASURED_SOURCES,
    },
)
