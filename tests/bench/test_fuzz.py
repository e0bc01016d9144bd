"""Random vision transformers, held to what holds for every model; and those that once broke it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.fuzz import drawn, main
from bench.fuzz_checks import Case, check
from bench.fuzz_models import Architecture

CASES, TOGETHER = 32, 4
ALONE, BY_DEFAULT = 8, (1,)

FOUND = {
    "patches by F.unfold, which no rule knew": (
        Case(Architecture(grid=(5, 4), prefix=3, depth=3, embed="unfold"), 0.7),
        "reduced",
    ),
    "patches by reshaping, in windows": (
        Case(Architecture(grid=(6, 4), prefix=0, depth=3, embed="reshape", window=2, pool="mean"), 0.8),
        "reduced",
    ),
    "keys repeated for grouped queries": (
        Case(Architecture(grid=(6, 6), depth=3, heads=4, head=16, key_heads=2), 0.7),
        "reduced",
    ),
    "grouped queries by enable_gqa": (
        Case(
            Architecture(
                grid=(6, 6), prefix=0, heads=2, key_heads=1, sharing="by attention", head=16, pool="mean", window=3
            ),
            0.9,
        ),
        "reduced",
    ),
    "rounding in bfloat16, by which an image alone chose another token": (
        Case(
            Architecture(
                grid=(6, 4),
                prefix=5,
                head=8,
                attention="multihead",
                position="sine",
                order="both",
                norm="rms",
                pool="all tokens",
                dtype="bfloat16",
            ),
            0.7,
            batch=2,
        ),
        "reduced",
    ),
    "budget 1.0 where no block can lose tokens": (
        Case(Architecture(grid=(4, 4), prefix=0, order="parallel", window=2, pool="mean"), 1.0),
        "exact",
    ),
}


@functools.cache
def cases() -> list[Case]:
    return drawn(CASES)


def chunks() -> list[Any]:
    """Return each test's case numbers: a few of one, since each takes seconds; four together in nightly runs."""
    few = [
        pytest.param(range(n, n + 1), id=str(n), marks=[] if n in BY_DEFAULT else [pytest.mark.nightly])
        for n in range(ALONE)
    ]
    many = range(ALONE, CASES, TOGETHER)
    return few + [pytest.param(range(n, n + TOGETHER), id=str(n), marks=pytest.mark.nightly) for n in many]


@pytest.mark.parametrize("numbers", chunks())
def test_an_exact_answer_or_a_refusal_by_name(numbers: range) -> None:
    outcomes = []
    for number in numbers:
        case = cases()[number]
        try:
            outcomes.append(check(case))
        except Exception as error:
            raise AssertionError(f"{case!r}: {type(error).__name__}: {error}") from error
    if len(outcomes) == TOGETHER:
        assert any(outcome in ("reduced", "exact") for outcome in outcomes), (
            "a chunk that is all refusals proves little"
        )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if n else ()) for n, name in enumerate(FOUND)]
)
def test_what_was_found_once(name: str) -> None:
    case, outcome = FOUND[name]
    assert check(case) == outcome


def test_cases_differ() -> None:
    """Hypothesis likes to vary one example; what is tried here is drawn anew each time."""
    assert len({case.architecture for case in cases()}) > 0.9 * CASES
    assert {case.architecture.window for case in cases()} == {0, 2, 3}
    assert len({case.strategy for case in cases()}) > 8
    assert {case.architecture.dtype for case in cases()} == {"float32", "float64", "bfloat16"}


def test_the_oracle_sees_a_token_too_many() -> None:
    """A model that is run with other patches masked is another model's answer."""
    arch = Architecture(grid=(4, 4), depth=2, pool="mean")
    model, x = arch.build(), arch.images(1)
    whole = model(x)
    gone = torch.zeros(17, dtype=torch.bool)
    model.masked = [gone] * 3
    torch.testing.assert_close(model(x), whole)
    gone = gone.index_fill(0, torch.tensor([5]), True)
    model.masked = [torch.zeros_like(gone), gone, gone]
    assert float((model(x) - whole).detach().abs().max()) > 1e-2


@pytest.mark.nightly
def test_the_command_counts_what_it_has_run(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    main(count=3, first=7, compiled=0.0, out=out)
    found = json.loads(out.read_text())
    assert found["cases"] == sum(found["outcomes"].values()) == 3 and not found["failures"]
    main(count=2, respelt=True, out=out)
    assert json.loads(out.read_text())["outcomes"] == {"right": 2}
