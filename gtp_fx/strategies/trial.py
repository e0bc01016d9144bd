"""Trial runs of a user's own strategy on numbers, which find faults that shapes can't show, before a model is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.errors import OptionError
from gtp_fx.graph.nodes import tensors_of
from gtp_fx.graph.symbols import per_image
from gtp_fx.strategies.group_operator import faults_named, read
from gtp_fx.strategies.registry import is_own

_IMAGES = 2


def try_out(graph: fx.Graph) -> None:
    """Run every `group` of a graph whose nodes carry shapes, on two images of random numbers.

    Raises OptionError where it fails, changes its input, returns something else the second time, or returns invalid
    groups.
    """
    for node in graph.nodes:
        if node.target is gtp_fx.group.default:
            strategy = read(str(node.args[-1]))
            fault = "" if is_own(type(strategy)) else _fault(node, strategy)
            if fault:
                raise OptionError(f"{type(strategy).__name__}.group() {fault}")


def _fault(node: fx.Node, strategy: Any) -> str:
    """Return what is wrong with the strategy's groups; empty where nothing is."""
    numbers = torch.Generator().manual_seed(0)
    args: list[Any] = [fx.map_arg(arg, lambda operand: _random(operand, numbers)) for arg in node.args]
    _, prefix, suffix, _ = args[-2]
    places_Bn = torch.arange(args[0].shape[1] - prefix - suffix).expand(_IMAGES, -1)
    if args[5] is not None:  # the tokens' positions can't be random: they ascend
        args[5] = places_Bn
    # A tensor's version counts what is written to it in place.
    before = [arg._version for arg in args if isinstance(arg, Tensor)]
    with faults_named(strategy):
        first, second = (dict(zip(strategy.results(), gtp_fx.group.default(*args), strict=True)) for _ in range(2))
    if [arg._version for arg in args if isinstance(arg, Tensor)] != before:
        return "changed a tensor that it was given in place: work on a copy"
    for name, value in first.items():
        if not torch.equal(value, second[name]):
            return (
                f"gave other {name} for the same tokens the second time: it has to draw no random numbers, so that "
                f"compiled and eager agree (gtp_fx.strategies.Random shows how to choose by a hash)"
            )
        if value.is_floating_point() and not value.isfinite().all():
            return f"gave {name} with nan or infinity for finite tokens"
        if name in ("kept", "removed") and (value.diff(dim=1) <= 0).any():
            return (
                f"gave {name} {value[0].tolist()[:8]}…, and indices ascend: sort them (gtp_fx.strategies.dropped does)"
            )
    if not torch.equal(torch.cat([first["kept"], first["removed"]], dim=1).sort(dim=1).values, places_Bn):
        return (
            f"gave kept and removed that aren't together the {places_Bn.shape[1]} patches, numbered from 0 behind the "
            f"prefix tokens"
        )
    return ""


def _random(operand: fx.Node, numbers: torch.Generator) -> Tensor:
    """Return a positive tensor, as scores and sizes are, of an operand's shape and dtype, for two images."""
    (value,) = tensors_of(operand.meta["val"])
    drawn = torch.rand((_IMAGES, *map(per_image, value.shape[1:])), generator=numbers) + 1.0
    return drawn.to(value.dtype)
