"""The options of `GTP`: what their names mean, and which values are none of theirs."""

from __future__ import annotations

import math

from gtp_fx.errors import OptionError, did_you_mean
from gtp_fx.ops.attention import SCORES
from gtp_fx.ops.token_graph import GRAPHS
from gtp_fx.strategies.plain_numbers import is_number
from gtp_fx.strategies.token_scale import AUTO

BRANCHES = {
    "idle": "a token that skips gets nothing, and stays what it was (IdleViT)",
    "recover": "it gets its neighbours' branch results",
}

RECOVERIES = {
    "update": "a removed token is what it was, plus the mean change of those that received it",
    "mean": "it is the mean of those that received it",
}


def check_options(
    *,
    score: object,
    graph: object,
    neighbors: object,
    alpha: object,
    token_scale: object,
    attention_sparsity: object,
    weighted_pooling: object,
    branch: object,
    recovery: object,
) -> None:
    """Check the options, as `GTP` names them. Raises OptionError for the first that can't be what it is."""
    _one_of("score", score, SCORES)
    _one_of("graph", graph, GRAPHS)
    if isinstance(neighbors, bool) or not isinstance(neighbors, int) or neighbors < 1:
        raise OptionError(f"GTP(neighbors={neighbors!r}): give an integer of at least 1 (the paper uses 8)")
    if not is_number(alpha) or not math.isfinite(alpha) or alpha < 0:
        raise OptionError(f"GTP(alpha={alpha!r}): give a finite number of 0 or more (the paper uses 0.1 to 0.4)")
    if not isinstance(token_scale, bool) and token_scale != AUTO:
        raise OptionError(f"GTP(token_scale={token_scale!r}): give True, False or {AUTO!r}")
    if not isinstance(weighted_pooling, bool):
        raise OptionError(f"GTP(weighted_pooling={weighted_pooling!r}): give True or False")
    _one_of("branch", branch, BRANCHES)
    _one_of("recovery", recovery, RECOVERIES)
    if not is_number(attention_sparsity) or not 0.0 < attention_sparsity <= 1.0:
        raise OptionError(
            f"GTP(attention_sparsity={attention_sparsity!r}): give theta with 0 < theta <= 1; 1 drops nothing"
        )


def _one_of(option: str, value: object, known: dict[str, str]) -> None:
    if value not in known:
        names = "\n".join(f"  {name!r}: {meaning}" for name, meaning in known.items())
        meant = did_you_mean(str(value), known)
        raise OptionError(f"GTP({option}={value!r}) is unknown{meant or ';'} {option} is one of\n{names}")
