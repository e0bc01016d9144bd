"""The default tier stays quick: what its last run took, case by case."""

from __future__ import annotations

import pytest

LIMIT = 8.0
"""Processor seconds of a case on a quiet machine, including the processes that it started."""
NOISE = 2.5
"""Two busy cores that share what a processor has take so much longer for the same work (the same case took 6.4 and 12.8
seconds), and the first case of a process imports for all."""
HEADER = 25.0
"""Processor seconds more for one case: the first that Inductor builds C++ for also compiles the header that the later
ones share."""


@pytest.mark.nightly
def test_no_case_of_the_default_tier_takes_long(request: pytest.FixtureRequest) -> None:
    cache = getattr(request.config, "cache", None)
    taken: dict[str, float] = cache.get("gtp_fx/processor_seconds", {}) if cache is not None else {}
    if not taken:
        pytest.skip("run pytest first, without -m nightly: its durations are what is looked at")
    slow = sorted((seconds, name) for name, seconds in taken.items() if seconds > LIMIT * NOISE)
    if slow and slow[-1][0] <= LIMIT * NOISE + HEADER:
        slow.pop()
    assert not slow, "nightly ones, or smaller models"
