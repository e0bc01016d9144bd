"""A user's own strategy tried out on numbers: what shapes can't show, found when a model is optimised instead of in its results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.errors import GtpError, OptionError
from gtp_fx.graphs import tensors_of
from gtp_fx.sizes import per_image
from gtp_fx.strategies.group_operator import read
from gtp_fx.strategies.registry import is_own

_IMAGES = 2


def try_out(graph: fx.Graph) -> None:
    """Run every `group` of a graph whose nodes carry shapes, on two images of random numbers.

    Raises OptionError where it fails, changes its input, says another thing the second time, or gives what aren't groups.
    """
    for node in graph.nodes:
        if node.target is gtp_fx.group.default and not is_own(type(read(node.args[-1]))):
            _try_out(node)


def _try_out(node: fx.Node) -> None:
    strategy: Any = read(str(node.args[-1]))
    owner, names = type(strategy).__name__, strategy.results()
    numbers = torch.Generator().manual_seed(0)
    args: list[Any] = [fx.map_arg(arg, lambda operand: _random(operand, numbers)) for arg in node.args]
    x_BNC, k, v, score, size, index, carried, grid, around, text = args
    _, prefix, suffix, _ = around
    count = x_BNC.shape[1] - prefix - suffix
    if index is not None:  # where tokens stand: other than numbers, they ascend
        index = torch.arange(count).expand(_IMAGES, count)
    args = [x_BNC, k, v, score, size, index, carried, grid, around, text]
    given = [arg for arg in args if isinstance(arg, Tensor)]
    before = [tensor._version for tensor in given]
    runs = []
    for _ in range(2):
        try:
            runs.append(gtp_fx.group.default(*args))
        except GtpError:
            raise
        except Exception as error:
            raise OptionError(f"{owner}.group() failed on tokens {tuple(x_BNC.shape)}: {error}") from error
    if [tensor._version for tensor in given] != before:
        raise OptionError(f"{owner}.group() changed a tensor that it was given in place: work on a copy")
    for name, first, second in zip(names, *runs, strict=True):
        if not torch.equal(first, second):
            raise OptionError(
                f"{owner}.group() gave other {name} for the same tokens the second time: it has to draw no random numbers, so that "
                f"compiled and eager agree (Random shows how to choose by a hash)"
            )
        if first.is_floating_point() and not first.isfinite().all():
            raise OptionError(f"{owner}.group() gave {name} with nan or infinity for finite tokens")
    _check_partition(owner, runs[0][0], runs[0][1], count)


def _check_partition(owner: str, kept_BK: Tensor, left_BP: Tensor, count: int) -> None:
    for name, index in (("kept", kept_BK), ("left", left_BP)):
        if (index.diff(dim=1) <= 0).any():
            raise OptionError(
                f"{owner}.group() gave {name} {index[0].tolist()[:8]}…, and indices ascend: sort them (gtp_fx.dropped does)"
            )
    both = torch.cat([kept_BK, left_BP], dim=1).sort(dim=1).values
    if not torch.equal(both, torch.arange(count).expand_as(both)):
        raise OptionError(
            f"{owner}.group() gave kept and left that aren't together the {count} patches, numbered from 0 behind the prefix tokens"
        )


def _random(operand: fx.Node, numbers: torch.Generator) -> Tensor:
    """Of a value's shape and dtype, for two images: positive, as scores and sizes are."""
    (value,) = tensors_of(operand.meta["val"])
    shape = (_IMAGES, *map(per_image, value.shape[1:]))
    drawn = torch.rand(shape, generator=numbers) + 1.0
    return drawn.to(value.dtype)
