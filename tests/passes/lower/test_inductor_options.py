"""What reaches Inductor: the target's options under the user's mode, through both doors and for the original."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import timm
import torch
from torch import nn

import gtp_fx
from bench.inductor_candidates import CANDIDATES
from bench.inductor_options import PLAIN, contender, measure, row
from gtp_fx.measure.benchmark import benchmark
from gtp_fx.measure.compare import Compilation, compare
from gtp_fx.measure.timing import Timings
from gtp_fx.model import backend
from gtp_fx.options.inductor import check_target
from gtp_fx.options.options import Options
from gtp_fx.targets import CPU, TARGETS, Target

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@dataclass
class Told:
    """Of each compilation, in order: config patches, and how many inputs its graph has."""

    patches: list[dict[str, Any]] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    """What reaches Inductor, which compiles nothing: graphs run eagerly."""
    seen = Told()

    def compile_fx(gm: Any, inputs: Any, *, config_patches: dict[str, Any] | None = None, **_: Any) -> Any:
        seen.patches.append(dict(config_patches or {}))
        seen.inputs.append(len(inputs))
        return gm

    monkeypatch.setattr(importlib.import_module("torch._inductor.compile_fx"), "compile_fx", compile_fx)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def tiny() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2
    ).eval()


def telling(**options: Any) -> Target:
    return replace(CPU, inductor={name.replace("__", "."): value for name, value in options.items()})


AUTOTUNED = {"max_autotune": True, "coordinate_descent_tuning": True}
OWN = telling(triton__cudagraphs=True, max_autotune=False, epilogue_fusion=False)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (None, dict(OWN.inductor)),
        ("default", dict(OWN.inductor)),
        ("max-autotune", {**AUTOTUNED, "triton.cudagraphs": True, "epilogue_fusion": False}),
        ("max-autotune-no-cudagraphs", {**AUTOTUNED, "epilogue_fusion": False}),
        ("reduce-overhead", {"triton.cudagraphs": True, "epilogue_fusion": False}),
    ],
)
def test_the_users_mode_wins(mode: str | None, expected: dict[str, Any]) -> None:
    options = Options.of(flops_budget=0.7, target=OWN, mode=mode)
    assert options.inductor(torch.device("cpu")) == expected


def test_a_target_that_is_elsewhere_tells_nothing() -> None:
    """To predict for it; the graph runs here."""
    for mode, expected in ((None, {}), ("reduce-overhead", {"triton.cudagraphs": True})):
        options = Options.of(flops_budget=0.7, target=replace(TARGETS["h100"], inductor=AUTOTUNED), mode=mode)
        assert options.inductor(torch.device("cpu")) == expected


@pytest.mark.nightly
@torch.no_grad()
def test_both_doors_and_the_original_beside_them_tell_the_same(told: Told) -> None:
    model = tiny()
    options: dict[str, Any] = {"schedule": [4, 0], "target": OWN, "mode": "max-autotune-no-cudagraphs"}
    torch.compile(model, backend=backend.gtp, options=options)(X)
    fast = gtp_fx.optimize(model, **options)
    compare(model, fast, X, rounds=1)
    assert told.patches == [{**AUTOTUNED, "epilogue_fusion": False}] * 3
    benchmark(model, {"one": fast}, X, rounds=1)
    assert told.patches[3:] and all(patches == told.patches[0] for patches in told.patches)
    with pytest.raises(gtp_fx.OptionError, match="different modes or targets"):
        benchmark(model, {"one": fast, "other": gtp_fx.optimize(model, schedule=[4, 0])}, X, rounds=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fastest"}, r"mode='fastest' is unknown; torch.compile has 'default', .*'reduce-overhead'"),
        ({"mode": ["max-autotune"]}, r"mode=\['max-autotune'\] is unknown"),
        ({"mode": "max-autotune", "compile": False}, "mode='max-autotune' is how to compile, and compile=False"),
        ({"target": telling(freezing=True)}, "target 'cpu': 'freezing' compiles copies of the weights"),
        ({"target": telling(max_autotun=True)}, "target 'cpu': Inductor has no option 'max_autotun'"),
        ({"target": telling(max_autotune="yes")}, "target 'cpu': .* max_autotune, got str should be bool"),
    ],
)
def test_refused_before_anything_is_captured(options: dict[str, Any], message: str) -> None:
    class Untouched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("captured")

    with pytest.raises(gtp_fx.OptionError, match=message):
        gtp_fx.optimize(Untouched(), flops_budget=0.7, example_inputs=X, **options)
    if "compile" not in options:
        with pytest.raises(gtp_fx.OptionError, match=message):
            backend.gtp(torch.fx.symbolic_trace(nn.Identity()), [X], options={"flops_budget": 0.7, **options})


@pytest.mark.parametrize("name", TARGETS)
def test_rows_and_candidates_are_options_that_inductor_has(name: str) -> None:
    check_target(TARGETS[name])
    for patches in CANDIDATES[name].values():
        options = {option: value for option, value in patches.items() if option != "freezing"}
        check_target(replace(TARGETS[name], inductor=options))


@torch.no_grad()
def test_frozen_weights_run_through_the_backend(told: Told) -> None:
    """Dynamo then keeps parameters in the graph and not among its inputs; so must the graph that is handed on."""
    model = tiny()
    options: dict[str, Any] = {"schedule": [4, 0]}
    wanted = gtp_fx.optimize(model, **options, compile=False)(X)
    with torch._inductor.config.patch(freezing=True):
        found = torch.compile(model, backend=backend.gtp, options=options)(X)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert told.inputs == [1]


# ---- the bench that says which option pays


def test_an_option_pays_by_more_than_a_per_cent_and_quartiles_apart() -> None:
    plain = {contender("original", PLAIN): (12.0, 12.0, 12.0), contender("optimised", PLAIN): (9.0, 10.0, 10.0)}

    def with_option(*fast: float) -> Any:
        seconds = {contender("original", "x"): (6.0, 6.0, 6.0), contender("optimised", "x"): fast}
        first = dict.fromkeys(seconds, Compilation(1.0, 0.0))
        return row("x", {}, Timings({**plain, **seconds}), first)

    good = with_option(8.0, 8.0, 8.0)
    assert good.pays and good.optimised_gain.median == 1.25
    assert good.original_gain.median == 2.0 and good.speed_up.median == 0.75
    assert good.ratio.median == 0.75 / 1.2  # over the speed-up without
    assert not with_option(9.0, 9.9, 9.9).pays, "quartiles overlap"
    assert not with_option(10.0, 10.0, 10.0).pays


@pytest.mark.nightly
def test_the_bench_tells_each_side_each_option(told: Told) -> None:
    schedule = gtp_fx.optimize(tiny(), schedule=[4, 0], compile=False).schedule
    candidates = {"contracted": CANDIDATES["cpu"]["contracted"], "frozen": CANDIDATES["cpu"]["frozen"]}
    timings, compilations = measure(tiny(), X, schedule, CPU, candidates, rounds=1)
    assert set(timings.seconds) == set(compilations) and len(timings.seconds) == 6
    assert told.patches[:4] == [{}, {}, candidates["contracted"], candidates["contracted"]]
    assert min(told.inputs[:4]) > 1 and told.inputs[4:] == [1, 1], (
        "weights are in the graph where they are to be frozen"
    )
