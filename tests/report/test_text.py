"""Tables and numbers for a terminal."""

from __future__ import annotations

import pytest

import gtp_fx
from gtp_fx.measure.benchmark import Benchmark, Entry
from gtp_fx.measure.compare import BASELINES, Agreement, Comparison, Compilation
from gtp_fx.measure.steadiness import Steadiness
from gtp_fx.measure.timing import Timings
from gtp_fx.report.forecast import BlockForecast, Cost, Forecast
from gtp_fx.report.text import described, number, table, wrapped

from support.printed import in_one_line

LAYER = "vision_model.encoder.layers.11.self_attention.attention"


def test_a_table_keeps_to_80_columns_and_the_ends_of_its_paths() -> None:
    wide = table(["#", "layer", "tokens\nin"], [[1, LAYER + LAYER, 196], [2, "short", 7]], left=(1,), shortened=1)
    above, heads, rule, first, second = wide.split("\n")
    assert max(map(len, wide.split("\n"))) == 80 and first.rstrip("196 ").endswith(LAYER) and "…" in first
    assert above.strip() == "tokens" and heads.split() == ["#", "layer", "in"] and second.endswith("  7")
    assert set(rule) == {"-", " "}
    assert table(["a", "b"], [["x", 10], ["yy", 2]]) == "a    b\n--  --\nx   10\nyy   2"


def test_numbers_are_never_powers_of_ten() -> None:
    assert list(map(number, (0.0811, 0.371, 12.43, 99.96, 100.4, 1174.2, 123456.7, 0))) == [
        *("0.0811", "0.371", "12.4", "100", "100", "1174", "123457", "0")
    ]


def test_a_strategys_values_stand_below_its_name() -> None:
    lines = described("gtp", str(gtp_fx.GTP()))
    assert lines[0] == "strategy gtp" and len(lines) > 2 and max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines[1:]).split()) == str(gtp_fx.GTP()).removeprefix("GTP(").removesuffix(")")


def test_what_the_commands_print_is_narrow_with_long_names_and_large_numbers() -> None:
    agreed = Agreement(8, 1.0, 0.9, 0.99)
    seconds = dict.fromkeys((*BASELINES, *BASELINES.values()), (1.25, 1.5))
    compiled = {name: Compilation(245.0, 0.0) for name in BASELINES if "compiled" in name}
    comparison = Comparison(agreed, compiled, 1e-3, Timings(seconds), 0.7399, 8, Steadiness(0.4, 0.55))
    entry = Entry("regeneration 0.74 FLOPs", 0.7399, 0.8, agreed, 245.0)
    timings = Timings({"original": (1.5,), entry.name: (1.0,)})
    benchmark = Benchmark("compiled", 8, (entry,), timings, Steadiness(None, 0.98))
    cost = Cost(1_234_567_000_000, 1.5)
    forecast = Forecast(
        budget="flops_budget=0.74",
        target="rtx4090",
        measured="",
        batch=8,
        strategy=str(gtp_fx.GTP()),
        strategy_name="gtp",
        damage_from="",
        schedule=gtp_fx.Schedule((0,), (gtp_fx.BlockShape(196, 384, 64),)),
        original=cost,
        blocks=(BlockForecast(0, LAYER, 196, 0, 64, cost, Cost(900_000_000_000, 1.0)),),
    )
    for shown in map(str, (comparison, benchmark, forecast)):
        assert max(map(len, shown.splitlines())) <= 80, shown
    busy = "too busy for times to be trusted: other programs left 55% of a processor"
    assert busy in in_one_line(str(comparison)) and "busy" not in str(benchmark)


def test_a_small_gain_is_said() -> None:
    def planned(after: float, count: int) -> str:
        whole, less = Cost(100, 1.0), Cost(90, after)
        blocks = (BlockForecast(0, "blocks.0", 196, count, 0, whole, less),)
        schedule = gtp_fx.Schedule((count,), (gtp_fx.BlockShape(196, 384, 64),))
        return Forecast("", "cpu", "", 8, "GTP()", "gtp", "", schedule, whole, blocks).hint

    assert "gain only 4.2%" in planned(0.96, 8) and "slower than the original" in planned(1.2, 8)
    assert planned(0.9, 8) == "" and planned(1.0, 0) == ""
    assert "the same time as the original" in planned(1.0003, 8) and "1.000×" not in planned(1.0003, 8)


def test_paragraphs_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "gtp-fx: a message\n  - blocks.0: " + "no token can leave " * 10
    first, *others = wrapped(text).split("\n")
    assert first == "gtp-fx: a message" and len(others) > 2 and max(map(len, others)) <= 80
    assert others[0].startswith("  - ") and all(line.startswith("    no") or line[4] != " " for line in others[1:])
    assert " ".join(wrapped(text).split()) == " ".join(text.split())
    monkeypatch.setenv("COLUMNS", "120")
    assert 80 < max(map(len, wrapped(text).split("\n"))) <= 120
    assert wrapped("/a" * 60) == "/a" * 60
