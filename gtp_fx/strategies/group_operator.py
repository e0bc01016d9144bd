"""A strategy's `group` as an operator of the graph, `torch.ops.gtp_fx.group`.

Composite, like every operator of the package: any batch, any device, and the compiler sees through it. The strategy travels with it as
JSON: its name, its fields, and a fingerprint of its code. So a graph holds nothing but operators and plain values, keeps
its class when another one takes the name, and no compiler's cache takes one for the other.
"""

from __future__ import annotations

import functools
import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gtp_fx.errors import GtpError, OptionError
from gtp_fx.ops.autocast import without_autocast
from gtp_fx.ops.register import operator
from gtp_fx.strategies.fingerprint import fingerprint
from gtp_fx.strategies.tokens import Groups, Tokens

if TYPE_CHECKING:
    from gtp_fx.strategies.grouping import Grouping

_CLASSES: dict[tuple[str, str], type] = {}
"""By name and fingerprint: every class that was ever registered."""
_CODES: dict[type, str] = {}


def enter(name: str, cls: type) -> None:
    """Let graphs name `cls`."""
    _CODES[cls] = fingerprint(cls)
    _CLASSES[name, _CODES[cls]] = cls
    read.cache_clear()  # the same code again, as a notebook's cell run twice, is another class


def code_of(cls: type) -> str:
    """A class's fingerprint. Raises OptionError where it isn't registered."""
    if cls not in _CODES:
        raise OptionError(f"{cls.__name__} isn't registered: put @gtp_fx.register_strategy over it")
    return _CODES[cls]


def written(strategy: Grouping) -> str:
    """The strategy as JSON. Raises OptionError where its class isn't registered, or its fields aren't plain values."""
    code = code_of(type(strategy))
    try:
        said = {field.name: getattr(strategy, field.name) for field in fields(strategy)}
        text = json.dumps({"name": strategy.name, "code": code, "fields": said})
        same = read(text) == strategy
    except (TypeError, ValueError) as error:
        raise OptionError(f"{strategy!r}: {_PLAIN} ({error})") from error
    if not same:
        raise OptionError(f"{strategy!r}: {_PLAIN}, and written down and read again it is {read(text)!r}")
    return text


_PLAIN = (
    "fields travel with the graph as JSON: numbers, strings, None, and tuples of those, all given to the constructor"
)


@functools.cache
def read(text: str) -> Any:
    """The strategy that `written` has written. Raises OptionError where this process knows no such class."""
    said = json.loads(text)
    name, code = said["name"], said["code"]
    if (name, code) not in _CLASSES:
        known = [other for known_name, other in _CLASSES if known_name == name]
        why = (
            f"the one registered here has other code ({', '.join(known)})"
            if known
            else "none of that name is registered"
        )
        raise OptionError(
            f"this graph was made with strategy {name!r} of code {code}, and {why}: register the same class, or optimize the model "
            f"again"
        )
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in said["fields"].items()}
    return _CLASSES[name, code](**given)


def _shapes(x, k, v, score, size, index, carried, grid, around, strategy):  # type: ignore[no-untyped-def]
    leaving, prefix, suffix, _ = around
    known = _promised(x.shape[0], x.shape[1] - prefix - suffix, leaving)
    return [x.new_empty(known[result][0], dtype=known[result][1]) for result in read(strategy).results()]


def _promised(batch: Any, count: Any, leaving: Any) -> dict[str, tuple[tuple[Any, ...], torch.dtype]]:
    """Shapes and dtypes of what a strategy may give."""
    kept = count - leaving
    return {
        "kept": ((batch, kept), torch.int64),
        "left": ((batch, leaving), torch.int64),
        "weights": ((batch, kept, leaving), torch.float32),
        "own": ((batch, kept), torch.float32),
        "size": ((batch, kept), torch.float32),
        "carried": ((batch, count), torch.float32),
    }


def _flops(*args: Any) -> int:
    """By running it without numbers, since it is somebody else's to write."""
    with FlopCounterMode(display=False) as counter:
        try:
            group(*args)
        except GtpError:
            raise
        except Exception as error:
            owner = type(read(args[-1])).__name__
            raise OptionError(
                f"{owner}.group() can't be traced: {error}. A compiler runs it without numbers: no .item() or branches on a tensor's "
                f"values, and new tensors on the device of those given (tokens.x_BNC.new_zeros, device=tokens.x_BNC.device)"
            ) from error
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
    return _listed(its, groups, _promised(batch, count, leaving))


def _listed(strategy: Grouping, groups: Any, promised: dict[str, tuple[tuple[Any, ...], torch.dtype]]) -> list[Tensor]:
    """What `group` decided, as the strategy has said that it would."""
    owner = type(strategy).__name__
    if not isinstance(groups, Groups):
        raise OptionError(f"{owner}.group() returned {type(groups).__name__}: return gtp_fx.Groups")
    found: dict[str, Any] = {
        "kept": groups.kept_BK,
        "left": groups.left_BP,
        "weights": groups.weights_BKP,
        "own": groups.own_BK,
        "size": groups.size_BK,
        "carried": groups.carried_Bn,
    }
    if groups.weights_BKP is not None and groups.own_BK is None:
        found["own"] = torch.ones_like(groups.kept_BK, dtype=torch.float32)
    named, given = strategy.results(), [name for name, value in found.items() if value is not None]
    if given != named:
        raise OptionError(
            f"{owner}.group() gave {', '.join(given)}, and its class says {', '.join(named)}: merges= for weights and "
            f"own, sized= for sizes and carries= for what is carried have to agree with it"
        )
    listed = [found[name].float() if found[name].is_floating_point() else found[name] for name in named]
    for name, value in zip(named, listed, strict=True):
        shape, dtype = promised[name]
        if tuple(value.shape) != tuple(shape) or value.dtype is not dtype:
            raise OptionError(
                f"{owner}.group() gave {name} of {tuple(value.shape)} in {value.dtype}, and it has to be {tuple(shape)} in {dtype}"
            )
    return listed
