"""Stages of `bench.gpu_quarter` as processes: turns, limits, one deadline, and that trouble stays where it is. Stages
here are shell scripts."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from bench.gpu_answers import answers
from bench.gpu_plan import Plan, first, options, sanitize, stages, tiles
from bench.gpu_quarter import Quarter
from bench.gpu_rounds import run_stages
from bench.gpu_turns import Outcome, Stage, Turn

READY = "touch turns/$0.ready; while [ ! -e turns/$0.go ]; do sleep 0.02; done; "
KEEP = 'echo "{\\"value\\": 1}" > found/$0.json; '
ALONE = "if ! mkdir alone 2>/dev/null; then touch found/shared; fi; sleep 0.2; rmdir alone; "


def stage(folder: Path, name: str, script: str, limit: float = 20, least: float = 0, prepare: float = 20) -> Stage:
    command = ("sh", "-c", f"cd {folder}; {script}", name)
    return Stage(name, command, limit, least, prepare, waits="turns/" in script)


def run(folder: Path, *asked: Stage, seconds: float = 20, settle: float = 20, processes: int = 4) -> dict[str, Outcome]:
    outcomes = run_stages(asked, folder, seconds=seconds, settle=settle, processes=processes)
    assert sorted(outcome.stage for outcome in outcomes) == sorted(one.name for one in asked), "each has an outcome"
    return {outcome.stage: outcome for outcome in outcomes}


def test_turns_are_had_one_at_a_time_in_order(tmp_path: Path) -> None:
    note = "echo $0 >> order; "
    asked = [stage(tmp_path, name, READY + ALONE + note + KEEP) for name in ("a", "b", "c")]
    asked.insert(0, stage(tmp_path, "through", note))
    found = run(tmp_path, *asked)
    assert [outcome.trouble for outcome in found.values()] == [""] * 4
    assert (tmp_path / "order").read_text().split() == ["through", "a", "b", "c"]
    assert not (tmp_path / "found" / "shared").exists()
    assert found["a"].seconds[1] >= 0.2 > found["through"].seconds[1] == 0


def test_what_gets_ready_is_halted_in_anothers_turn(tmp_path: Path) -> None:
    """The slow one counts, twenty times a second, and is not ready when turns begin.

    It puts each number in place as a whole: it may be halted at any time, also while it writes.
    """
    counting = "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo $i > new; mv new count; sleep 0.05; done; "
    measure = READY + "sleep 0.2; cp count before; sleep 0.6; cp count after; "
    found = run(
        tmp_path, stage(tmp_path, "slow", counting + READY), stage(tmp_path, "quick", measure), settle=0.5, seconds=30
    )
    before, after = (int((tmp_path / name).read_text()) for name in ("before", "after"))
    assert before == after < 60
    assert found["slow"].trouble == found["quick"].trouble == ""


def test_a_crash_or_a_hang_costs_itself_alone(tmp_path: Path) -> None:
    found = run(
        tmp_path,
        stage(tmp_path, "crash", READY + KEEP + "echo illegal access >&2; kill -SEGV $$"),
        stage(tmp_path, "fails", "echo no such thing; exit 3"),
        stage(tmp_path, "hang", READY + KEEP + "sleep 60", limit=0.5),
        stage(tmp_path, "never", "sleep 60; " + READY, prepare=0.5),
        stage(tmp_path, "good", READY + KEEP),
    )
    assert found["crash"].trouble == "ended by signal 11: illegal access"
    assert found["fails"].trouble == "failed with exit code 3: no such thing"
    assert found["hang"].trouble == "stopped: its turn had 0.5 s"
    assert found["never"].trouble == "stopped: not ready within 0.5 s"
    assert found["good"].trouble == ""
    assert {file.stem for file in (tmp_path / "found").glob("*.json")} == {"crash", "hang", "good"}, (
        "what they had is kept"
    )


def test_nothing_is_begun_that_does_not_fit(tmp_path: Path) -> None:
    begun = time.monotonic()
    found = run(
        tmp_path,
        stage(tmp_path, "first", READY + "sleep 60"),
        stage(tmp_path, "large", READY, least=60),
        stage(tmp_path, "late", READY),
        seconds=1.5,
        settle=0.3,
        processes=1,
    )
    assert time.monotonic() - begun < 4
    assert found["large"].trouble.startswith("left out: ") and found["large"].trouble.endswith("it takes 60")
    assert found["first"].trouble == "stopped in its turn when time was over"
    assert found["first"].failed and not found["large"].failed
    assert found["late"].trouble.startswith("left out: ") and found["late"].trouble.endswith("time was over")


def test_a_turn_is_told_its_seconds(tmp_path: Path) -> None:
    run(tmp_path, stage(tmp_path, "a", READY + "cp turns/$0.go told", limit=5))
    assert 0 < float((tmp_path / "told").read_text()) <= 5
    turn = Turn(tmp_path, "b")
    (tmp_path / "turns" / "b.go").write_text("7.5")
    turn.wait()
    assert 7 < turn.left <= 7.5
    turn.keep({"x": 1})
    assert json.loads((tmp_path / "found" / "b.json").read_text()) == {"x": 1}


def test_rounds_share_one_deadline_and_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second round comes behind the first, whatever became of it; what a cut-off stage had is in the files."""
    folder, out = tmp_path / "work", tmp_path / "out"
    scripts = {"checks-nets": KEEP, "model-S-256": READY + KEEP + "sleep 60", "sweep-B": READY + KEEP}
    monkeypatch.setattr(
        "bench.gpu_plan.stages",
        lambda names, folder, dry: [stage(folder, name, scripts[name], limit=0.5) for name in names],
    )
    quarter = Quarter("first", out, folder, dry=True, commit="")
    quarter.run(Plan((("checks-nets", "model-S-256"), ("sweep-B",)), 20, 20), 20, processes=2, cores=2)
    assert [outcome.stage for outcome in quarter.outcomes] == ["checks-nets", "model-S-256", "sweep-B"]
    models = json.loads((out / "models.json").read_text())
    assert models["dry_run"] is True and models["found"] == {"model-S-256": {"value": 1}}
    assert json.loads((out / "ablations.json").read_text())["found"] == {"sweep-B": {"value": 1}}
    assert "model-S-256: stopped: its turn had 0.5 s" in (out / "log.txt").read_text()
    assert quarter.pack() == [] and len(list(out.iterdir())) <= 8


def test_every_stage_of_every_plan_has_limits_and_fits(tmp_path: Path) -> None:
    for dry in (False, True):
        for plan in (first(dry), sanitize("attend", dry), tiles(dry), options(dry)):
            made = stages(plan.names, tmp_path, dry)
            assert len({one.name for one in made}) == len(made)
            assert all(0 <= one.least < plan.seconds and one.prepare < plan.seconds for one in made)
            assert all(one.limit >= one.least for one in made if one.waits)


def test_answers_are_few_and_name_what_is_missing() -> None:
    row = {
        "net": "S",
        "batch": 256,
        "contenders": {
            "original, default, cudnn": {"failed": "", "rounds": [2.6, 2.6]},
            "original, default, flash": {"failed": "Error: no", "rounds": []},
            "ours, default, cudnn": {"failed": "", "rounds": [2.0, 2.0]},
        },
        "fastest": {"original": "original, default, cudnn", "ours": "ours, default, cudnn"},
        "speed_up": [1.29, 1.30, 1.31],
        "predicted": 1.2,
        "flops_ratio": 0.74,
        "not_run": ["original, default, flash", "original, max-autotune, cudnn"],
        "wrong": [],
        "profile": {},
    }
    lines = answers({"model-S-256": row}, [Outcome("sweep-B", "left out: time was over", (0, 0))])
    assert "goal 1.30? met: 1.300x (1.290 – 1.310)" in lines[0]
    assert "the fastest of 1, 2 not run" in lines[0] and "best" not in lines[0] and "FAILED: original" in lines[0]
    assert lines[-1] == "left out or failed: sweep-B (left out: time was over)"
    assert (
        answers({"sweep-B": {"net": "B"}, "model-S-256": row}, [])[1]
        == "sweep? it can't be read off what was kept, KeyError: 'steps'"
    )
    many = {f"model-S-{batch}": {**row, "batch": batch} for batch in range(2, 50)}
    assert len(answers(many, [])) == 30
