"""A GPU without a file of its own: an A100's rates. Schedules depend on their proportions more than their size."""

from dataclasses import replace

from gtp_fx.targets.a100 import A100

GENERIC_GPU = replace(
    A100, name="generic-gpu", devices=(), sources={"*": "A100's; run `gtp-fx tune` for this GPU's own"}
)
