"""Judgments kept in the user's cache, so that a second run, also with another budget, makes only those it lacks."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

import gtp_fx.ops
import gtp_fx.strategies
from gtp_fx.options.calibration import Call
from gtp_fx.plan.plan import Plan
from gtp_fx.targets.cache import cache_folder, keep_json

_VERSION = 2
"""Version of what a judgment is, beside the code that `_code` reads."""


@dataclass(eq=False)
class Kept:
    """The judgments of one graph on given images.

    file: where they are; None where none are kept.
    values: the divergence of each plan on each part of the images.
    """

    file: Path | None
    values: dict[str, float] = field(default_factory=dict)
    _new: bool = False

    @classmethod
    def of(cls, gm: fx.GraphModule, calls: Sequence[Call], cache: bool) -> Kept:
        """Return what is kept for a graph with its weights, and for images, as they are cut into calls.

        cache: whether anything is read or written.
        """
        if not cache:
            return cls(None)
        file = cache_folder() / "judgments" / f"{_digest(gm, calls)}.json"
        return cls(file, _read(file))

    def get(self, plan: Plan, part: int) -> float | None:
        """Return the divergence of a plan on a part of the images; None where it isn't known."""
        return self.values.get(_key(plan, part))

    def put(self, plan: Plan, part: int, moved: float) -> None:
        self.values[_key(plan, part)] = moved
        self._new = True

    def write(self) -> None:
        """Write what is new, beside what other processes have written meanwhile."""
        if self.file is None or not self._new:
            return
        values = {**_read(self.file), **self.values}
        keep_json(self.file, {"version": _VERSION, "torch": torch.__version__, "values": values})
        self._new = False


def _key(plan: Plan, part: int) -> str:
    """Return what tells judgments on one graph and its images apart."""
    strategy, counts = plan.strategy, plan.schedule.removed
    return f"{part}: {strategy} {strategy.code} {','.join(map(str, counts))}"


def _digest(gm: fx.GraphModule, calls: Sequence[Call]) -> str:
    """Return a hash of the graph, its weights and the images, and of this package's code that judgments rest on."""
    digest = hashlib.sha256(f"{_VERSION} {_code()}".encode())
    digest.update(gm.code.encode())
    # Hashing every element of a large model would take long: each tensor gives its sum and some of its elements.
    for tensor in [*gm.state_dict().values(), *pytree.tree_leaves(list(calls))]:
        if isinstance(tensor, Tensor):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().double().sum().cpu().numpy().tobytes())
            digest.update(_some(tensor).double().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


@functools.cache
def _code() -> str:
    """Return a hash of this package's strategies and operators, and of what divergence is."""
    folders = [Path(__file__).parent, *(Path(module.__path__[0]) for module in (gtp_fx.ops, gtp_fx.strategies))]
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _some(tensor: Tensor, most: int = 4096) -> Tensor:
    """Return about `most` elements of a tensor, evenly spaced."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // most)]


def _read(file: Path) -> dict[str, float]:
    """Read a file of judgments; nothing where it is missing or unreadable."""
    try:
        data: Any = json.loads(file.read_text())
        return {str(key): float(value) for key, value in data["values"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
