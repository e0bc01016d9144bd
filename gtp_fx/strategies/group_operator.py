"""A strategy's `group` as an operator of the graph, `torch.ops.gtp_fx.group`.

Composite, like every operator of the package: any batch, any device, and the compiler sees through it. The strategy travels with it as
JSON, its class by a key that no two classes ever share (`keys`): a graph holds nothing but operators and plain values, and
keeps its class when another one takes the name. A `strategy` here is a `grouping.Grouping`, which stands on this file.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gtp_fx.errors import GtpError, OptionError
from gtp_fx.ops.autocast import without_autocast
from gtp_fx.ops.register import operator
from gtp_fx.strategies.keys import entered
from gtp_fx.strategies.tokens import Groups, Tokens


def key_of(cls: Any) -> str:
    """The key that graphs name a class by. Raises OptionError where it isn't registered."""
    if "_key" not in vars(cls):  # a base's is no key of its own
        raise OptionError(f"{cls.__name__} isn't registered: put @gtp_fx.strategies.register_strategy over it")
    return str(cls._key)


def written(strategy: Any) -> str:
    """The strategy as JSON. Raises OptionError where its class isn't registered, or its fields aren't plain values."""
    key = key_of(type(strategy))
    try:
        text = json.dumps([key, {field.name: getattr(strategy, field.name) for field in fields(strategy)}])
        if (again := read(text)) == strategy:
            return text
        why = f"written down and read again it is {again!r}"
    except (TypeError, ValueError) as error:
        why = str(error)
    raise OptionError(
        f"{strategy!r}: fields travel with the graph as JSON: numbers, strings, None, and tuples of those, all given to the "
        f"constructor ({why})"
    )


@functools.cache
def read(text: str) -> Any:
    """The strategy that `written` has written. Raises OptionError where this process knows no such class."""
    key, given = json.loads(text)
    return entered(key)(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


@contextlib.contextmanager
def faults_named(strategy: Any) -> Iterator[None]:
    """Raises OptionError, with the class and what to do, for what its `group` raises."""
    try:
        yield
    except GtpError:
        raise
    except Exception as error:
        raise OptionError(
            f"{type(strategy).__name__}.group() failed: {error}. It is run on random numbers and, by a compiler, without numbers: no "
            f".item() or branches on a tensor's values, and new tensors on the device of those given (tokens.x_BNC.new_zeros)"
        ) from error


def promised(strategy: Any, count: Any, leaving: Any) -> dict[str, tuple[tuple[Any, ...], torch.dtype]]:
    """An image's shape, and the dtype, of each result that the strategy's class says that it gives."""
    kept = count - leaving
    shapes = {"kept": (kept,), "left": (leaving,), "weights": (kept, leaving), "own": (kept,), "size": (kept,)}
    shapes["carried"] = (count,)
    return {
        name: (shapes[name], torch.int64 if name in ("kept", "left") else torch.float32) for name in strategy.results()
    }


def _shapes(x, k, v, score, size, index, carried, grid, around, strategy):  # type: ignore[no-untyped-def]
    leaving, prefix, suffix, _ = around
    known = promised(read(strategy), x.shape[1] - prefix - suffix, leaving)
    return [x.new_empty(x.shape[0], *shape, dtype=dtype) for shape, dtype in known.values()]


def _flops(*args: Any) -> int:
    """By running it without numbers, since it is somebody else's to write."""
    with faults_named(read(args[-1])), FlopCounterMode(display=False) as counter:
        group(*args)
    return int(counter.get_total_flops())


@operator(_shapes, flops=_flops)
def group(
    x_BNC: Tensor,
    k_BHND: Tensor | None,
    v_BHND: Tensor | None,
    score_Bn: Tensor | None,
    size_Bn: Tensor | None,
    index_Bn: Tensor | None,
    carried_Bn: Tensor | None,
    grid: list[int],
    around: list[int],
    strategy: str,
) -> list[Tensor]:
    """What `strategy` (as `written`) makes of a site's tokens: of `Groups`, what its class says that it gives, in that order.

    around: how many patches leave, prefix tokens, suffix tokens, the block's number. The other arguments are those of `Tokens`.
    """
    its, (leaving, prefix, suffix, block) = read(strategy), around
    batch, count = x_BNC.shape[0], x_BNC.shape[1] - prefix - suffix
    if index_Bn is None:
        index_Bn = torch.arange(count, device=x_BNC.device).expand(batch, count)
    seen = (x_BNC, k_BHND, v_BHND, score_Bn, size_Bn, index_Bn, carried_Bn)
    # What ranks and matches is float32 whatever the model's products are under autocast.
    with without_autocast(x_BNC):
        groups = its.group(Tokens(*seen, tuple(grid), leaving, prefix, suffix, block))
    owner = type(its).__name__
    if not isinstance(groups, Groups):
        raise OptionError(f"{owner}.group() returned {type(groups).__name__}: return gtp_fx.strategies.Groups")
    found: dict[str, Tensor | None] = {f.name.rpartition("_")[0]: getattr(groups, f.name) for f in fields(groups)}
    if groups.weights_BKP is not None and groups.own_BK is None:
        found["own"] = torch.ones_like(groups.kept_BK, dtype=torch.float32)
    given = {
        name: value.float() if value.is_floating_point() else value
        for name, value in found.items()
        if value is not None
    }
    known = promised(its, count, leaving)
    if given.keys() != known.keys():
        raise OptionError(
            f"{owner}.group() gave {', '.join(given)}, and its class says {', '.join(known)}: merges= for weights and "
            f"own, sized= for sizes and carries= for what is carried have to agree with it"
        )
    for name, (shape, dtype) in known.items():
        value, wanted = given[name], (batch, *shape)
        if tuple(value.shape) != wanted or value.dtype is not dtype:
            raise OptionError(
                f"{owner}.group() gave {name} of {tuple(value.shape)} in {value.dtype}, and it has to be {wanted} in {dtype}"
            )
    return list(given.values())
