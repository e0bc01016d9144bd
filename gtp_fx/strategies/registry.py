"""Strategies by name: this package's and a user's own."""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from gtp_fx.errors import OptionError, did_you_mean
from gtp_fx.strategies.group_operator import written
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.gtp import GTP
from gtp_fx.strategies.keys import enter, lasting
from gtp_fx.strategies.protocol import Strategy

STRATEGIES: dict[str, type] = {GTP.name: GTP}
"""The class of each name. `strategy="name"` means its defaults."""
AUTO = "auto"
"""What `strategy=` takes beside these names (`gtp_fx.strategies.auto`)."""

C = TypeVar("C", bound=type[Grouping])


def register_strategy(cls: C) -> C:
    """Make `strategy="<cls.name>"` and values of `cls` work everywhere. A decorator over a frozen dataclass.

    A class replaces an earlier one of the same name, as notebooks need it, but never one of this package's. Raises
    OptionError where the class can't be a strategy.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not (name.isidentifier() and name.isascii()):
        raise OptionError(f"{cls.__name__}.name={name!r}: give a class variable such as name: ClassVar[str] = 'mine'")
    if "__dataclass_fields__" not in vars(cls) or not issubclass(cls, Grouping):  # inherited, they would lack its own
        raise OptionError(
            f"{cls.__name__} is no dataclass over gtp_fx.strategies.Grouping: write @dataclass(frozen=True) above it"
        )
    if name == AUTO:
        raise OptionError(f"{cls.__name__}.name={name!r} means a choice among all strategies; give another")
    before = STRATEGIES.get(name)
    if before is not None and is_own(before) and before is not cls:
        own = ", ".join(name for name, known in STRATEGIES.items() if is_own(known))
        raise OptionError(f"{cls.__name__}.name={name!r} is one of gtp_fx's own: {own}; give another")
    # A class with a `reduce` of its own may do without both methods.
    for method, where in (("group", True), ("put_back", cls.restores_tokens)):
        if where and getattr(cls, method) is getattr(Grouping, method) and cls.reduce is Grouping.reduce:
            raise OptionError(f"{cls.__name__} has no {method}(): {_WANTED[method]}")
    if cls.before_attention and cls.score != "none":
        raise OptionError(
            f"{cls.__name__}.score={cls.score!r}: before_attention = True lets tokens leave before there are scores; "
            f"leave one out"
        )
    if cls.shortens_queries and not cls.before_attention:
        raise OptionError(
            f"{cls.__name__}: shortens_queries = True has sites at the inputs of blocks: before_attention = True, too"
        )
    cls._key = enter(name, cls, sys._getframe(1))
    STRATEGIES[name] = cls
    return cls


_WANTED = {
    "group": "write what it makes of gtp_fx.strategies.Tokens, a gtp_fx.strategies.Groups",
    "put_back": "with restores_tokens = True it has to say how tokens come back; leave restores_tokens out "
    "where they never do",
}


def is_own(cls: type) -> bool:
    """Return whether the class is this package's."""
    return cls.__module__.startswith(__package__)


def strategy_named(strategy: str | Strategy) -> Strategy:
    """Return a strategy by its name, by its name with values, "regeneration(windows=rest)", or the value itself.

    Raises OptionError for anything else, and for a strategy that can't travel with a graph.
    """
    if isinstance(strategy, str):
        strategy = _as_written(strategy)
    if isinstance(strategy, type) or not hasattr(strategy, "site_works"):
        raise OptionError(f"strategy={strategy!r} is neither a name nor a strategy value such as gtp_fx.GTP(alpha=0.2)")
    if isinstance(strategy, Grouping):
        written(strategy)
    return strategy


def _as_written(text: str) -> Strategy:
    """Return the strategy of "name" or "name(field=value, …)"."""
    name, bracket, _ = text.partition("(")
    if name not in STRATEGIES:
        known = ", ".join(map(repr, (AUTO, *STRATEGIES)))
        raise OptionError(
            f"strategy={text!r} is unknown; give one of {known}, one with values such as 'gtp(alpha=0.2)', or a value "
            f"such as gtp_fx.GTP(alpha=0.2){did_you_mean(name, (AUTO, *STRATEGIES))}"
        )
    cls = STRATEGIES[name]
    given = _values(text) if bracket else {}
    own = [field.name for field in fields(cls) if field.init]
    if unknown := [field for field in given if field not in own]:
        meant = did_you_mean(unknown[0], own) or "."
        raise OptionError(
            f"strategy={text!r}: {name} has no {unknown[0]}{meant} It has {', '.join(own) or 'no values'}"
        )
    needed = [each.name for each in fields(cls) if each.init and each.default is each.default_factory is MISSING]
    if missing := [field for field in needed if field not in given]:
        raise OptionError(
            f"strategy={text!r}: {name} has no default for {', '.join(missing)}: '{name}({missing[0]}=…)'"
        )
    try:
        return cls(**given)  # type: ignore[no-any-return]
    except TypeError as error:  # of a value that is compared before its type is looked at
        raise OptionError(f"strategy={text!r}: a value is of the wrong type ({error})") from error


def as_written(strategy: Strategy) -> str:
    """Return a strategy as `strategy=` takes it, "gtp(alpha=0.2)": its name, with values that aren't its defaults."""
    values = []
    for field in fields(strategy):  # type: ignore[arg-type]
        value = getattr(strategy, field.name)
        if field.init and value != field.default:
            is_word = isinstance(value, str) and value.isidentifier() and value not in ("True", "False", "None")
            values.append(f"{field.name}={value if is_word else repr(value)}")
    return f"{strategy.name}({', '.join(values)})" if values else strategy.name


def _values(text: str) -> dict[str, Any]:
    """Return the values in "name(field=value, …)": numbers, True, False, None, tuples of these, and words."""
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError
        if any(value.arg is None for value in call.keywords):
            raise ValueError
        return {
            str(value.arg): _word(value.value.id)
            if isinstance(value.value, ast.Name)
            else ast.literal_eval(value.value)
            for value in call.keywords
        }
    except (SyntaxError, ValueError) as error:
        raise OptionError(
            f"strategy={text!r} can't be read; write a name and its values, such as 'gtp(alpha=0.2, graph=spatial)'"
        ) from error


def _word(word: str) -> str | float:
    """Return what a word without quotes means: infinity, or text."""
    return math.inf if word == "inf" else word


def to_plain(strategy: Strategy) -> dict[str, Any]:
    """Return a strategy as plain values, from which `of_plain` makes it again in another process.

    Raises OptionError where its class isn't registered or can't be recognised elsewhere, or a field is no plain value.
    """
    name, cls = strategy.name, type(strategy)
    if STRATEGIES.get(name) is not cls:
        raise OptionError(
            f"strategy {name!r} is a {cls.__name__}, and the name is not registered for that class, by which a file "
            f"could have it: write it as a gtp_fx.strategies.Grouping with @gtp_fx.strategies.register_strategy"
        )
    plain = {
        "name": name,
        "code": lasting(getattr(strategy, "code_keys", ())),
        "fields": {field.name: getattr(strategy, field.name) for field in fields(strategy)},  # type: ignore[arg-type]
    }
    try:
        if of_plain(json.loads(json.dumps(plain))) == strategy:
            return plain
        why = "read again, they are others"
    except (TypeError, ValueError) as error:
        why = str(error)
    raise OptionError(f"{strategy!r} can't be written down: its fields have to be numbers, strings or None ({why})")


def of_plain(plain: Mapping[str, Any]) -> Strategy:
    """Return the strategy that `to_plain` described.

    Raises OptionError where nothing is registered by its name, or other code than was.
    """
    name, codes = plain["name"], plain["code"]
    if name not in STRATEGIES:
        raise OptionError(
            f"strategy {name!r} is not registered here ({', '.join(map(repr, STRATEGIES))} are): import the module "
            f"that registers it first"
        )
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in plain["fields"].items()}
    made: Strategy = STRATEGIES[name](**given)
    if (found := lasting(getattr(made, "code_keys", ()))) != codes:
        raise OptionError(
            f"strategy {name!r} was saved with the code {', '.join(codes)}, and here is {', '.join(found)}: register "
            f"the same code, or optimize the model again"
        )
    return made
