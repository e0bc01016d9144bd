"""Any CPU, with Inductor's defaults."""

from gtp_fx.targets.target import Target

CPU = Target(name="cpu", device="cpu")
