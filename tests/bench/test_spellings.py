"""One ViT in many spellings: the same schedule and the same numbers as the canonical one's."""

from __future__ import annotations

import pytest
import torch

from bench.spellings import _error, build, canonical, check, differing, images, one_at_a_time
from bench.spelt.model import CHOICES, Spelling, canonical_of

EVERY = list(one_at_a_time())
EVERY_DAY = [
    Spelling(linear="addmm", projection="joint, chunk", attention="einsum, ellipsis", residual="lerp"),
    Spelling(residual="in place", layout="[N, B, C]"),
]


def test_the_canonical_one_loses_tokens_at_several_blocks() -> None:
    found = canonical(Spelling())
    assert sum(count > 0 for count in found.schedule) > 1 and found.ratio <= 0.6


@torch.no_grad()
def test_every_spelling_computes_the_same() -> None:
    """Otherwise what is compared are two models."""
    for spelling in EVERY:
        wanted = build(canonical_of(spelling))(images(2))
        assert _error(build(spelling)(images(2)), wanted) < 1e-5, differing(spelling)


@pytest.mark.parametrize(
    "spelling",
    [*EVERY_DAY, *(pytest.param(spelling, marks=pytest.mark.nightly) for spelling in EVERY[::6])],
    ids=lambda spelling: str(differing(spelling)),
)
def test_a_spelling_is_reduced_as_the_canonical_one(spelling: Spelling) -> None:
    assert check(spelling) == "right"


def test_every_part_has_several_ways() -> None:
    assert len(EVERY) == sum(len(names) - 1 for names in CHOICES.values()) > 60
