"""A GPU without a file of its own: Inductor's defaults."""

from gtp_fx.targets.target import Target

GENERIC_GPU = Target(name="generic-gpu", device="cuda")
