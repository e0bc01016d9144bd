"""How far times can be trusted, and when they can't."""

from __future__ import annotations

import time

import pytest

from gtp_fx.errors import BusyError
from gtp_fx.measure.steadiness import Steadiness, processor_share
from gtp_fx.measure.timing import Timings


def test_a_thread_that_waits_has_no_processor() -> None:
    with processor_share() as waiting:
        time.sleep(0.2)
    assert waiting.value is not None and waiting.value < 0.5
    with processor_share() as working:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass
    assert working.value is not None and 0.05 < working.value < 1.05


def test_the_spread_is_the_middle_contenders() -> None:
    seconds = {"steady": (1.0, 1.0, 1.0), "between": (0.9, 1.0, 1.1), "wild": (0.1, 1.0, 9.0)}
    steady = Steadiness.of(Timings(seconds), 0.97)
    assert steady.spread == pytest.approx(0.05) and str(steady) == "± 5%, 97% of a processor"
    steady.must_be_steady()
    assert str(Steadiness.of(Timings({"once": (1.0,)}), None)) == "too few to tell their spread"


@pytest.mark.parametrize(
    ("spread", "share", "told"),
    [(0.01, 0.6, "other programs left 60% of a processor"), (0.4, None, "differ by ± 40% from round to round")],
)
def test_a_busy_machine_is_refused_by_what_shows_it(spread: float, share: float | None, told: str) -> None:
    with pytest.raises(BusyError, match=f"too busy to be measured: .*{told}.*--anyway"):
        Steadiness(spread, share).must_be_steady()
