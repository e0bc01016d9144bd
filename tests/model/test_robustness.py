"""Threads, twice, copies, and files that mean harm: nothing silent, nothing run, nothing half changed."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import gtp_fx
from gtp_fx.cli.models import load_named
from gtp_fx.errors import LoadError

from support.zoo import enliven

NAME = "test_vit"
BUDGETS = (0.9, 0.7)


def model(seed: int = 0, depth: int = 3) -> nn.Module:
    return enliven(timm.create_model(NAME, depth=depth), seed).eval()


def noise(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.mark.nightly
@torch.no_grad()
def test_threads_optimising_at_once() -> None:
    """The same models and others, in each thread; torch's tracing patches the whole process, so they take turns."""
    models, wanted = [model(seed) for seed in range(2)], []
    for one, budget in zip(models, BUDGETS, strict=True):
        wanted.append(gtp_fx.optimize(one, flops_budget=budget, compile=False)(noise()))
    together = threading.Barrier(4)

    def work(number: int) -> Tensor:
        together.wait()
        which = number % 2
        fast = gtp_fx.optimize(models[which], flops_budget=BUDGETS[which], compile=False)
        return fast(noise())

    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        for number, found in enumerate(pool.map(work, range(4))):
            torch.testing.assert_close(found, wanted[number % 2], rtol=1e-4, atol=1e-4)
    assert not any(one.training for one in models)


@torch.no_grad()
def test_one_optimised_model_in_several_threads() -> None:
    """Its first call makes what runs, in each of them."""
    fast = gtp_fx.optimize(model(), flops_budget=0.7, compile=False)
    batches = [noise(1 + number % 4) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x: fast(x).detach(), batches))
    for x, y in zip(batches, found, strict=True):
        torch.testing.assert_close(y, fast(x), rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_optimising_what_is_optimised_is_refused_and_the_original_is_not() -> None:
    original = model()
    fast = gtp_fx.optimize(original, flops_budget=0.7, compile=False)
    with pytest.raises(gtp_fx.OptionError, match=r"optimised already, to 0\.\d+ of its FLOPs: optimize the original"):
        gtp_fx.optimize(fast, flops_budget=0.5)
    torch._dynamo.reset()  # what other tests have compiled is none of this one's
    with pytest.raises(Exception, match="optimised already; compile it with"):
        torch.compile(fast, backend="gtp", options={"flops_budget": 0.5})(noise())
    again = gtp_fx.optimize(original, flops_budget=0.5, compile=False)
    assert again.report.flops_ratio < fast.report.flops_ratio <= 0.7
    assert [p is q for p, q in zip(again.parameters(), fast.parameters(), strict=True)].count(False) == 0


@pytest.mark.nightly
@torch.no_grad()
def test_a_copy_is_its_own_with_methods_and_all(tmp_path: Path) -> None:
    fast = gtp_fx.optimize(model(), flops_budget=0.7, compile=False)
    x = noise()
    wanted, features = fast(x), fast.forward_features(x)
    twin = copy.deepcopy(fast)
    torch.save(fast, tmp_path / "fast.pt")
    loaded = torch.load(tmp_path / "fast.pt", weights_only=False)
    for other in (twin, loaded):
        assert type(other) is type(fast) and other.schedule == fast.schedule
        torch.testing.assert_close(other(x), wanted)
        torch.testing.assert_close(other.forward_features(x), features)
        for parameter in other.parameters():
            parameter.zero_()
        assert float(other.forward_features(x).abs().max()) < float(features.abs().max()) / 2
    torch.testing.assert_close(fast(x), wanted)


@torch.no_grad()
def test_weights_swapped_after_optimize() -> None:
    """By the optimised model's state dict, by the original's, and in place: all are one set of tensors."""
    original, other = model(), model(seed=3)
    fast = gtp_fx.optimize(original, flops_budget=0.7, compile=False)
    wanted = gtp_fx.optimize(other, schedule=fast.schedule, compile=False)(noise())
    kept = copy.deepcopy(fast.state_dict())
    original.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(noise()), wanted)
    before = fast(noise())
    fast.load_state_dict(kept)
    assert not torch.allclose(fast(noise()), before)
    torch.testing.assert_close(original.state_dict(), kept)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fast.load_state_dict({**kept, "head.weight": kept["head.weight"][:5]})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: {"flops_budget": 0.01},
        lambda m: {"flops_budget": 0.7, "schedule": [1, 2]},
        lambda m: {"flops_budget": 0.7, "example_inputs": torch.randn(2, 5)},
        lambda m: {"flops_budget": 0.7, "strategy": gtp_fx.GTP(neighbors=5000)},
        lambda m: {"flops_budget": 0.7, "calibration": torch.randn(2, 3, 8, 8)},
    ],
)
@torch.no_grad()
def test_a_failed_optimize_leaves_the_model_as_it_was(spoil: Callable[[nn.Module], dict[str, object]]) -> None:
    original = model()
    original.blocks[1].train()
    modes = [m.training for m in original.modules()]
    before, wanted = copy.deepcopy(original.state_dict()), original(noise())
    attributes = {name: list(vars(module)) for name, module in original.named_modules()}
    with pytest.raises(gtp_fx.GtpError):
        gtp_fx.optimize(original, **spoil(original))  # type: ignore[arg-type]
    torch.testing.assert_close(original.state_dict(), before, rtol=0, atol=0)
    assert [m.training for m in original.modules()] == modes
    assert {name: list(vars(module)) for name, module in original.named_modules()} == attributes
    assert torch.equal(original(noise()), wanted)


GOOD = {"version": 4, "strategy": "tome", "removed": [1, 2], "blocks": [{"tokens": 9, "channels": 8, "head": 4}] * 2}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "7",
        "[" * 100_000,
        '{"version": 2}',
        json.dumps({**GOOD, "version": "__import__('os').system('true')"}),
        json.dumps({**GOOD, "removed": "12"}),
        json.dumps({**GOOD, "removed": [1, -2]}),
        json.dumps({**GOOD, "removed": [1, 2.5]}),
        json.dumps({**GOOD, "removed": [1, True]}),
        json.dumps({**GOOD, "removed": [1]}),
        json.dumps({**GOOD, "removed": {"__reduce__": [1, 2]}}),
        json.dumps({**GOOD, "blocks": [{"tokens": 9, "channels": 8, "head": 4, "__class__": "os.system"}] * 2}),
        json.dumps({**GOOD, "blocks": [{"tokens": "9", "channels": 8, "head": 4}] * 2}),
        json.dumps({**GOOD, "blocks": 3}),
        json.dumps({**GOOD, "strategy": ["tome"]}),
        json.dumps(GOOD).replace("[1, 2]", "[NaN, 2]"),
    ],
)
def test_a_hostile_schedule_is_refused(text: str) -> None:
    with pytest.raises(gtp_fx.ScheduleError):
        gtp_fx.Schedule.from_json(text)


@pytest.mark.parametrize(("version", "counts"), [(2, "propagated"), (3, "removed")])
def test_a_schedule_of_a_version_before_is_read_and_for_any_strategy(version: int, counts: str) -> None:
    now = gtp_fx.Schedule.from_json(json.dumps(GOOD))
    before = {"version": version, counts: GOOD["removed"], "blocks": GOOD["blocks"]}
    assert gtp_fx.Schedule.from_json(json.dumps(before)) == dataclasses.replace(now, strategy="")
    assert now.removed == (1, 2) and now.strategy == "tome"


def test_a_schedule_of_huge_numbers_is_refused_by_the_model() -> None:
    counts = [10**30, 0, 0]
    with pytest.raises(gtp_fx.ScheduleError, match="at least one has to stay"):
        gtp_fx.optimize(model(), schedule=counts, compile=False)


def test_a_directorys_own_code_is_never_run(tmp_path: Path) -> None:
    """A Hugging Face configuration may name code beside it; a checkpoint may hold any object."""
    marker = tmp_path / "touched"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = {
        "model_type": "evil",
        "architectures": ["Model"],
        "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="no configuration of"):
        load_named(str(tmp_path))
    assert not marker.exists()


@pytest.mark.nightly
def test_a_spoilt_cache_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path))
    images = noise(2)

    def calibrated() -> gtp_fx.Schedule:
        return gtp_fx.optimize(model(), flops_budget=0.7, calibration=images, compile=False).schedule

    wanted = calibrated()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files
    for file in files:
        file.write_text('{"version": [[[')
    assert calibrated() == wanted
