"""NVIDIA H200 SXM."""

from gtp_fx.targets.shared_figures import (
    FLASH_TILES,
    GRAPH_LAUNCHES,
    HOPPER_TILE_SOURCE,
    HOPPER_TILES,
    UNMEASURED_CURVES,
    UNMEASURED_SOURCES,
    counted_curves,
)
from gtp_fx.targets.target import Curve, Target

H200 = Target(
    name="h200",
    device="cuda",
    devices=("NVIDIA H200",),
    dense={"bfloat16": 989.4e12, "float16": 989.4e12, "float32": 66.9e12},
    bandwidth=4.8e12,
    launch=1.2e-6,
    units=132,
    tiles=HOPPER_TILES,
    attention_tile=(128, 128),
    curves={
        "product": Curve(((1e9, 0.80),)),
        "convolution": Curve(((1e9, 0.80),)),
        "attention": Curve(((512, 0.40), (1024, 0.43), (2048, 0.45))),
        "stream": Curve(((1e6, 0.80),)),
        **UNMEASURED_CURVES,
        **counted_curves(132, 1.755e9, 4.8e12),
    },
    sources={
        "dense": "data sheet: 989.4 TFLOP/s bf16 and fp16 without sparsity, 66.9 TFLOP/s fp32 (H100's, the same die)",
        "bandwidth": "data sheet: 4.8 TB/s",
        "launch": GRAPH_LAUNCHES,
        "units": "device property: 132 multiprocessors",
        "tiles": HOPPER_TILE_SOURCE,
        "attention_tile": FLASH_TILES,
        "curves.product": "published: 0.803 of the dense rate for the best large products on H100 "
        "(stas00/ml-engineering, accelerator benchmarks); H200 is said to be the same",
        "curves.convolution": "assumed as products'",
        "curves.attention": "assumed: 1.4 times FlashAttention-2's published forward at head size 64 "
        "(Dao-AILab/flash-attention, assets/flash3_fp16_fwd), since torch takes cuDNN's attention there, for which "
        "users publish 1.7 to 2.3 times (huggingface/transformers#48163)",
        "curves.stream": "published: reads at 0.81 of the data sheet's rate (RRZE-HPC/gpu-benches)",
        **UNMEASURED_SOURCES,
    },
)
