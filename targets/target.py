"""A processor as the compiler knows it: its roofs, and how near each kind of work comes to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gtp_fx.errors import OptionError
from gtp_fx.targets.work import KINDS


@dataclass(frozen=True)
class Curve:
    """The share of its roof that a kind of work reaches, by its amount.

    Between points the share is interpolated over the logarithm of the amount. Outside them it is that of the nearest
    point. Raises OptionError where the points don't ascend or a share is not in (0, `MOST_SHARE`].

    points: (amount, share) pairs, amounts ascending.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        amounts = [amount for amount, _ in self.points]
        if not amounts or amounts != sorted(set(amounts)) or amounts[0] <= 0:
            raise OptionError(f"a curve's amounts are positive and ascend, got {amounts}")
        if any(not 0 < share <= MOST_SHARE for _, share in self.points):
            raise OptionError(f"a curve's shares are in (0, {MOST_SHARE:g}], got {[share for _, share in self.points]}")

    def __call__(self, amount: Any) -> Any:
        """Return the share at an amount, or at each of an array of them."""
        import numpy as np  # here, so that names of targets cost nothing

        amounts, shares = zip(*self.points, strict=True)
        return np.interp(np.log(np.maximum(amount, 1)), np.log(amounts), shares)


MOST_SHARE = 64.0
"""The largest share of a roof.

A share of the bandwidth may be above one: data in caches comes faster than from main memory, and what stays in
registers needs none.
"""


@dataclass(frozen=True)
class Tile:
    """A block of a product's result that a unit makes at once.

    Large tiles reuse more of what they read. Small ones waste less where a product ends, and keep more units busy.

    rows, columns: its size.
    share: share of the best tile's rate that it reaches, in (0, 1].
    """

    rows: int
    columns: int
    share: float = 1.0

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1 or not 0 < self.share <= 1:
            raise OptionError(f"a tile has rows, columns and a share in (0, 1], got {self}")


SCALE_FORMS = ("mask", "channel", "kernel")
"""Ways for attention to read token scales on a GPU (`gtp_fx.passes.lower.attention_forms`), in the order of "auto"."""


@dataclass(frozen=True)
class Target:
    """One processor, or a kind of them. Raises OptionError where a figure is missing or not a positive number.

    name: as users give it.
    device: torch's device type.
    dense: FLOP/s of dense products, by torch's name of the dtype.
    bandwidth: bytes/s of main memory.
    launch: seconds from one kernel to the next.
    curves: a Curve for each kind of work (`gtp_fx.targets.work.KINDS`): shares of the dense rate or of the bandwidth.
    sources: where each figure comes from.
    units: multiprocessors or cores, which tiles are spread over.
    tiles: tiles of products, of which a library takes the fastest; () where the curve includes them.
    attention_tile: queries and keys of attention's tile.
    devices: the driver's names of it, to the letter: a slice or a laptop's part has other rates and a longer name.
    scale_form: how attention reads token scales, a name in `SCALE_FORMS`; "auto" for the first that is possible, where
        a mask counts only if attention keeps the kernel that it has without.
    inductor: options for Inductor that were measured to pay there (`bench.inductor_options`); a mode that the user
        passes wins over them.
    measured: when and by what the curves were measured; empty where they weren't.
    """

    name: str
    device: str
    dense: Mapping[str, float]
    bandwidth: float
    launch: float
    curves: Mapping[str, Curve]
    sources: Mapping[str, str]
    units: int = 1
    tiles: tuple[Tile, ...] = ()
    attention_tile: tuple[int, int] = (1, 1)
    devices: tuple[str, ...] = ()
    scale_form: str = "auto"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    measured: str = ""

    def __post_init__(self) -> None:
        rates = {**{f"dense[{dtype!r}]": rate for dtype, rate in self.dense.items()}, "bandwidth": self.bandwidth}
        for what, value in {**rates, "units": self.units, "attention_tile": min(self.attention_tile)}.items():
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"target {self.name!r}: {what} is {value!r}; give a positive number")
        if not (math.isfinite(self.launch) and self.launch >= 0) or not self.dense:
            raise OptionError(
                f"target {self.name!r}: launch={self.launch!r}, dense={dict(self.dense)!r}: give seconds and rates"
            )
        if self.scale_form not in ("auto", *SCALE_FORMS):
            names = ", ".join(map(repr, ("auto", *SCALE_FORMS)))
            raise OptionError(f"target {self.name!r}: scale_form={self.scale_form!r} is unknown; give one of {names}")
        if missing := sorted(set(KINDS) - set(self.curves)):
            raise OptionError(f"target {self.name!r} has no curve for {', '.join(missing)}; KINDS names what is needed")

    @property
    def has_kernels(self) -> bool:
        """Return whether GTP's operators run as kernels there (`gtp_fx.kernels`)."""
        return self.device == "cuda"

    def on_threads(self, threads: int) -> Target:
        """Return the target of so many cores, for rates that are one core's."""
        dense = {dtype: rate * threads for dtype, rate in self.dense.items()}
        return replace(self, dense=dense, bandwidth=self.bandwidth * threads)

    def rate(self, dtype: str) -> float:
        """Return the FLOP/s of dense products; float32's for a dtype that isn't listed."""
        return self.dense.get(dtype, self.dense.get("float32", min(self.dense.values())))
