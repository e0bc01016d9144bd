"""The wild models' bench: each verdict on a class made here; the libraries needn't be installed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bench import wild, wild_row
from bench.scratch_vit import ScratchViT
from bench.wild_models import Calling, WildModel, every, of
from bench.wild_row import BUDGET, Row, measure
from bench.wild_workers import measured

from support.checkout import ROOT

RESULT = ROOT / "bench" / "results" / "wild.json"

VIT = WildModel("none", "scratch", lambda: ScratchViT(size=32, patch=8, width=32, depth=3, heads=2), ((3, 32, 32),))
CONVOLUTIONS = WildModel("none", "convolutions", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), ((3, 8, 8),))
GOOD = Row("none", "scratch", "reduced", exact=1e-7, ratio=0.73, moved=0.1, sites=2, blocks=3, dynamo="agree")


@pytest.mark.nightly
def test_both_entry_points_reduce_a_class_and_refuse_another() -> None:
    refused = measure(CONVOLUTIONS)
    assert (refused.verdict, refused.dynamo) == ("refused", "agree")
    row = measure(VIT)
    assert (row.verdict, row.message, row.dynamo) == ("reduced", "", "agree")
    assert row.ratio is not None and 0.5 < row.ratio <= BUDGET
    assert row.exact is not None and row.exact < 1e-5
    assert row.moved is not None and row.moved > 0.01


def test_a_refusal_is_told_with_its_message() -> None:
    row = measure(CONVOLUTIONS, dynamo=False)
    assert (row.verdict, row.ratio) == ("refused", None)
    assert "no self-attention" in row.message


class Magnifying(ScratchViT):
    """Doubles the distance of nearby values twenty-four times, so that rounding in float32 becomes a wrong number."""

    def forward(self, images: Tensor) -> Tensor:
        results = super().forward(images).sigmoid()
        for _ in range(24):
            results = 4 * results * (1 - results)
        return results


def test_what_rounding_alone_moves_far_is_compared_in_double_precision() -> None:
    magnifying = replace(VIT, build=lambda: Magnifying(size=32, patch=8, width=32, depth=3, heads=2))
    row = measure(magnifying, dynamo=False)
    assert (row.verdict, row.message) == ("reduced", "")
    assert wild_row._original(VIT)[2][0].dtype == torch.float32
    assert wild_row._original(magnifying)[2][0].dtype == torch.float64


class Scaled(nn.Module):
    """The original, its results times `by`, in place of what `optimize` returns."""

    def __init__(self, model: nn.Module, by: float, reported: float) -> None:
        super().__init__()
        self.model, self.by = model, by
        self.report = SimpleNamespace(flops_ratio=reported, sites=(), blocks=3)

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.by * self.model(*inputs)
        return result


@pytest.mark.parametrize(
    ("by", "reported", "told"),
    [(1.01, 0.7, "not exact at budget 1.0"), (1.0, 0.7, "over budget: 1.0000 by torch's counter, 0.7000 reported")],
)
def test_a_broken_promise_is_wrong(by: float, reported: float, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wild_row.gtp_fx, "optimize", lambda model, **_: Scaled(model, by, reported))
    row = measure(VIT)
    assert row.verdict == "WRONG" and told in row.message


def test_a_fused_layer_is_counted_as_what_it_computes() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    tokens, projections, attention = 3, 3 * 8 * (3 * 8 + 8 + 2 * 16), 2 * 3 * 3 * 8
    with torch.no_grad():
        assert wild_row._flops(layer, (torch.ones(1, tokens, 8),)) == 2 * (projections + attention)
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_exception_is_a_crash_and_a_missing_library_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("a domain")

    monkeypatch.setattr(wild_row.gtp_fx, "optimize", broken)
    row = measure(VIT)
    assert row.verdict == "CRASH" and "KeyError: 'a domain'" in row.message
    missing = measure(of("none", "no_such_library.vit:ViT", (3, 8, 8), depth=3))
    assert missing.verdict == "skipped" and "no_such_library" in missing.message


def test_what_torch_compile_cannot_run_without_us_is_no_crash_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise KeyError("a guard")

    monkeypatch.setattr(wild_row, "_dynamo", broken)
    row = measure(CONVOLUTIONS)
    assert row.verdict == "CRASH" and "a guard" in row.message
    monkeypatch.setattr(wild_row.torch, "compile", lambda *_, **__: broken)
    row = measure(CONVOLUTIONS)
    assert row.verdict == "refused" and "with backend='eager' as well: 'a guard'" in row.dynamo


def test_every_entry_has_a_name_of_its_own_and_is_called_with_batches() -> None:
    keys = [model.key for model in every()]
    assert len({*keys}) == len(keys) >= 150
    assert [tuple(x.shape) for x in every()[0].call(3)] == [(3, *shape) for shape in every()[0].shapes]
    called = WildModel("none", "pair", lambda: Calling(nn.Identity(), lambda inner, x: (inner(x), 2)), ((4,),))
    assert called.build()(*called.call(2))[1] == 2


@pytest.mark.nightly
def test_a_process_that_ends_or_hangs_ends_no_other_row() -> None:
    ended = list(measured([3, 4], work=os._exit))  # type: ignore[arg-type]
    assert [row.message for row in ended] == [f"the process ended with status {status}" for status in (3, 4)]
    (hung,) = measured([100], limit=0.5, work=time.sleep)  # type: ignore[arg-type]
    assert (hung.verdict, hung.name) == ("CRASH", every()[100].name) and "no answer" in hung.message


def test_the_command_goes_on_where_it_stopped_and_fails_on_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def made(numbers: Sequence[int], *_: Any) -> Iterator[Row]:
        for number in numbers:
            asked.append(number)
            entry = every()[number]
            verdict = "CRASH" if entry.name == "vit_3d.ViT" else "reduced"
            yield replace(GOOD, library=entry.library, name=entry.name, verdict=verdict)

    monkeypatch.setattr(wild, "measured", made)
    out = tmp_path / "wild.json"
    first, second = "vit_1d.ViT", "vit_3d.ViT"
    run = CliRunner().invoke(wild.command, ["--only", first, "--out", str(out), "--summary"])
    assert run.exit_code == 0 and "1 reduced" in run.output and "exact passes alone" in run.output
    again = CliRunner().invoke(wild.command, ["--only", first, "--only", second, "--out", str(out)])
    assert again.exit_code == 1 and asked == [*dict.fromkeys(asked)]
    written = json.loads(out.read_text())
    assert (written["dtype"], written["flops_budget"]) == ("float32", BUDGET)
    commit = written["environment"]["commit"]
    assert written["rows"][0] == asdict(replace(GOOD, library="vit-pytorch", name=first, commit=commit))
    # At another commit, all are measured again, or those with the verdicts that are named; and each says at which.
    for row in written["rows"]:
        row["commit"] = "another"
    out.write_text(json.dumps(written))
    both = ["--only", first, "--only", second, "--out", str(out)]
    CliRunner().invoke(wild.command, [*both, "--again", "CRASH"])
    assert [every()[number].name for number in asked[2:]] == [second]
    assert [row["commit"] for row in json.loads(out.read_text())["rows"]] == ["another", commit]
    CliRunner().invoke(wild.command, both)
    assert [every()[number].name for number in asked[3:]] == [first]
    unknown = CliRunner().invoke(wild.command, ["--only", "nonesuch"])
    assert unknown.exit_code == 2 and "nonesuch" in unknown.output


def test_the_committed_result_has_no_fault_and_is_what_the_docs_show() -> None:
    rows = [Row(**row) for row in json.loads(RESULT.read_text())["rows"]]
    assert {(row.library, row.name) for row in rows} == {model.key for model in every()}
    assert [row.name for row in rows if row.verdict in wild.FAULTS] == []
    assert sum(row.verdict in ("reduced", "lowest", "refused") for row in rows) >= 150
    assert wild.summary(rows) in (ROOT / "docs" / "models.md").read_text(), "paste what `bench.wild --summary` prints"
    assert wild.table(rows, "github") in RESULT.with_suffix(".md").read_text()
