"""The graph operator `torch.ops.gtp_fx.group`, which runs a strategy's `group`.

It is composite, like every operator of the package: it takes any batch and any device, and the compiler sees through
it. The strategy travels with the operator as JSON, and its class as a key that no two classes share (`keys`). So a
graph holds only operators and plain values, and keeps its class when another class takes the name. A `strategy` here is
a `grouping.Grouping`; that file imports this one.
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
    """Return the key by which graphs name a class. Raises OptionError where the class isn't registered."""
    if "_key" not in vars(cls):  # a base's is no key of its own
        raise OptionError(f"{cls.__name__} isn't registered: put @gtp_fx.strategies.register_strategy over it")
    return str(cls._key)


def written(strategy: Any) -> str:
    """Return the strategy as JSON. Raises OptionError for an unregistered class or a field that isn't a plain value."""
    key = key_of(type(strategy))
    try:
        text = json.dumps([key, {field.name: getattr(strategy, field.name) for field in fields(strategy)}])
        if (again := read(text)) == strategy:
            return text
        why = f"written down and read again it is {again!r}"
    except (TypeError, ValueError) as error:
        why = str(error)
    raise OptionError(
        f"{strategy!r}: fields travel with the graph as JSON: numbers, strings, None, and tuples of those, "
        f"all given to the constructor ({why})"
    )


@functools.cache
def read(text: str) -> Any:
    """Return the strategy that `written` serialised. Raises OptionError where this process has no class of that key."""
    key, given = json.loads(text)
    return entered(key)(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


@contextlib.contextmanager
def faults_named(strategy: Any) -> Iterator[None]:
    """Turn what the strategy's `group` raises into an OptionError that names the class and says what to do."""
    try:
        yield
    except GtpError:
        raise
    except Exception as error:
        raise OptionError(
            f"{type(strategy).__name__}.group() failed: {error}. It is run on random numbers and, by a compiler, "
            f"without numbers: no .item() or branches on a tensor's values, and new tensors on the device of those "
            f"given (tokens.x_BNC.new_zeros)"
        ) from error


def promised(strategy: Any, count: Any, removed: Any) -> dict[str, tuple[tuple[Any, ...], torch.dtype]]:
    """Return the shape for one image, and the dtype, of each result that the strategy's class promises."""
    kept = count - removed
    shapes = {"kept": (kept,), "removed": (removed,), "weights": (kept, removed), "own": (kept,), "size": (kept,)}
    shapes["carried"] = (count,)
    return {
        name: (shapes[name], torch.int64 if name in ("kept", "removed") else torch.float32)
        for name in strategy.results()
    }


def _shapes(x, k, v, score, size, index, carried, grid, around, strategy):  # type: ignore[no-untyped-def]
    removed, prefix, suffix, _ = around
    known = promised(read(strategy), x.shape[1] - prefix - suffix, removed)
    return [x.new_empty(x.shape[0], *shape, dtype=dtype) for shape, dtype in known.values()]


def _flops(*args: Any) -> int:
    """Count by running the operator on meta tensors: a user writes `group`, so no formula knows its FLOPs."""
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
    """Run the strategy's `group` at a site.

    strategy: what `written` returned.
    around: number of patches to remove, prefix tokens, suffix tokens, the block's number.

    The other arguments are the fields of `Tokens`. Returns those fields of `Groups` that the strategy's class promises,
    in the order of `Grouping.results`. Raises OptionError where `group` returned anything else.
    """
    its, (removed, prefix, suffix, block) = read(strategy), around
    batch, count = x_BNC.shape[0], x_BNC.shape[1] - prefix - suffix
    if index_Bn is None:
        index_Bn = torch.arange(count, device=x_BNC.device).expand(batch, count)
    seen = (x_BNC, k_BHND, v_BHND, score_Bn, size_Bn, index_Bn, carried_Bn)
    # Ranking and matching run in float32, whatever dtype autocast gives the model's products.
    with without_autocast(x_BNC):
        groups = its.group(Tokens(*seen, tuple(grid), removed, prefix, suffix, block))
    owner = type(its).__name__
    if not isinstance(groups, Groups):
        raise OptionError(f"{owner}.group() returned {type(groups).__name__}: return gtp_fx.strategies.Groups")
    # What the operator returns has to be what the class promises: the graph was built by that.
    found: dict[str, Tensor | None] = {f.name.rpartition("_")[0]: getattr(groups, f.name) for f in fields(groups)}
    if groups.weights_BKP is not None and groups.own_BK is None:
        found["own"] = torch.ones_like(groups.kept_BK, dtype=torch.float32)
    given = {
        name: value.float() if value.is_floating_point() else value
        for name, value in found.items()
        if value is not None
    }
    known = promised(its, count, removed)
    if given.keys() != known.keys():
        raise OptionError(
            f"{owner}.group() gave {', '.join(given)}, and its class says {', '.join(known)}: merges= for weights and "
            f"own, sized= for sizes and carries= for what is carried have to agree with it"
        )
    for name, (shape, dtype) in known.items():
        value, wanted = given[name], (batch, *shape)
        if tuple(value.shape) != wanted or value.dtype is not dtype:
            raise OptionError(
                f"{owner}.group() gave {name} of {tuple(value.shape)} in {value.dtype}, "
                f"and it has to be {wanted} in {dtype}"
            )
    return list(given.values())
