"""Targets are sane values with sources; predicted seconds follow roofs, tiles and traffic; measured curves are kept."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gtp_fx
from gtp_fx.errors import BusyError
from gtp_fx.measure import probes as probing
from gtp_fx.measure import tune_target as tuning
from gtp_fx.measure.steadiness import Share
from gtp_fx.plan.cost.seconds import seconds
from gtp_fx.targets import CPU, TARGETS, Curve, Target, detect, listed, target_named
from gtp_fx.targets.tuned import as_dict, from_dict, load_tuned, save_tuned, tuned_file
from gtp_fx.targets.work import KINDS, Work


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_every_figure_has_a_source(target: Target) -> None:
    assert set(target.curves) == set(KINDS)
    for figure in ("dense", "bandwidth", "launch"):
        assert any(source in ("*", figure) for source in target.sources), figure
    for kind in KINDS:
        assert {f"curves.{kind}", "curves", "*"} & set(target.sources), kind


def test_the_gpus_that_the_issue_names_are_there() -> None:
    assert {"h200", "h100", "a100", "l4", "rtx4090", "cpu", "generic-gpu"} == set(TARGETS)
    devices = [device for target in TARGETS.values() for device in target.devices]
    assert len(devices) == len(set(devices))


def test_a_gpu_is_known_by_its_whole_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of an H100 and a laptop's 4090 have longer names and other rates."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, expected in [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "generic-gpu"),
        ("NVIDIA L40", "generic-gpu"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "generic-gpu"),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert listed().name == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bandwidth": 0.0}, "bandwidth is 0.0"),
        ({"dense": {"float32": -1.0}}, r"dense\['float32'\] is -1.0"),
        ({"launch": float("nan")}, "launch=nan"),
        ({"curves": {}}, "no curve for attention"),
    ],
)
def test_a_target_with_a_bad_figure_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(gtp_fx.OptionError, match=message):
        replace(CPU, **changes)  # type: ignore[arg-type]


def test_curves_interpolate_over_the_logarithm_and_end_flat() -> None:
    curve = Curve(((1e2, 0.2), (1e4, 0.6)))
    assert curve(1) == pytest.approx(0.2)
    assert curve(1e3) == pytest.approx(0.4)
    assert curve(np.array([1e4, 1e9])).tolist() == pytest.approx([0.6, 0.6])
    with pytest.raises(gtp_fx.OptionError, match="ascend"):
        Curve(((1e4, 0.2), (1e2, 0.6)))


def test_products_are_bound_by_the_dense_rate_and_streams_by_bandwidth() -> None:
    h100 = TARGETS["h100"]
    flops, side = 2 * 8192**3, 8192
    product = Work("product", flops, 3 * side * side * 2, rows=side, columns=side, dtype="bfloat16")
    assert seconds(product, h100) == pytest.approx(flops / (989.4e12 * 0.8), rel=0.05)
    moved = 1 << 30
    assert seconds(Work("stream", bytes=moved), h100) == pytest.approx(moved / (3.352e12 * 0.82), rel=0.01)


def test_attention_climbs_in_tiles() -> None:
    """One token more than a tile costs a whole one."""
    tokens = np.array([127, 128, 129, 200, 256, 257])
    work = Work("attention", 4 * 64 * tokens**2 * 4096, rows=tokens, tokens=tokens, batch=4096, dtype="bfloat16")
    taken = seconds(work, TARGETS["h100"])
    assert taken[0] == pytest.approx(taken[1], rel=0.01)
    assert taken[2] == pytest.approx(taken[4], rel=0.01)
    assert taken[2] > 2 * taken[1]
    assert taken[5] > 1.5 * taken[4]


def test_a_wave_that_is_not_full_takes_as_long() -> None:
    h100 = TARGETS["h100"]
    one_tile = replace(h100, tiles=h100.tiles[:1])
    rows = np.array([128 * 66, 128 * 132, 128 * 133])

    def product(target: Target) -> np.ndarray:
        return seconds(Work("product", 2 * rows * 256 * 4096, rows=rows, columns=256, dtype="bfloat16"), target)

    half, full, over = product(one_tile)
    assert half == pytest.approx(full, rel=0.01)
    assert over > 1.9 * full
    assert product(h100)[0] < half, "a library has smaller tiles for that"


def test_more_work_never_takes_less_time_without_tiles() -> None:
    amounts = np.logspace(4, 11, 40)
    for kind in KINDS:
        taken = seconds(Work(kind, flops=amounts, bytes=amounts / 10, tokens=200), CPU.on_threads(2))
        assert (np.diff(taken) > 0).all(), kind


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path))
    return tmp_path


def fake_probes() -> list[probing.Probe]:
    """Times of a machine of 100 GFLOP/s and 20 GB/s, 1 us a launch, by the kinds' own laws."""
    none = (probing.CALL, probing.SHORT_CHAIN, probing.LONG_CHAIN)
    probes = [probing.Probe(name, "", 0, Work("stream"), lambda: None) for name in none]
    for kind in KINDS:
        for amount in (1e6, 1e8):
            probes.append(
                probing.Probe(f"{kind} {amount}", kind, amount, Work(kind, flops=amount, bytes=amount), lambda: None)
            )
    return probes


def test_curves_go_through_what_was_measured(cache: Path) -> None:
    probes = fake_probes()
    rate = {
        "product": 100e9,
        "convolution": 50e9,
        "attention": 25e9,
        "stream": 20e9,
        "scores": 5e9,
        "gather": 4e9,
        "neighbors": 3e9,
        "sort": 1e8,
    }
    taken = {p.name: 1e-6 + p.amount / rate[p.kind] for p in probes if p.kind}
    taken |= {probing.CALL: 20e-6, probing.SHORT_CHAIN: 21e-6, probing.LONG_CHAIN: 41e-6}
    target = tuning.fitted(CPU, probes, taken, "float32", 3)
    assert target.rate("float32") == pytest.approx(100e9, rel=0.01)
    assert target.bandwidth == pytest.approx(20e9, rel=0.01)
    assert target.launch == pytest.approx(1e-6)
    for probe in (p for p in probes if p.kind):
        work = replace(
            probe.work, bytes=probe.amount if probe.kind not in ("product", "convolution", "attention") else 0
        )
        work = replace(work, flops=probe.amount if work.bytes == 0 else 0, tokens=probe.amount)
        assert float(seconds(work, target)) == pytest.approx(taken[probe.name], rel=0.1), probe.name


def test_what_was_measured_is_kept_and_found_again(cache: Path) -> None:
    target = replace(listed("cpu"), bandwidth=123e9, measured="once")
    assert load_tuned(listed("cpu")) is None
    file = save_tuned(target)
    assert file.is_relative_to(cache)
    found = detect("cpu")
    assert (found.bandwidth, found.measured) == (123e9, "once")
    assert target_named("cpu") == found
    assert from_dict(CPU, json.loads(json.dumps(as_dict(target)))).curves == target.curves


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 1, "target": "h100"}', '{"version": 99}'])
def test_a_file_that_is_no_measurement_counts_as_none(cache: Path, text: str) -> None:
    file = tuned_file(listed("cpu"))
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert detect("cpu") == listed("cpu")


def test_tune_refuses_a_busy_machine_before_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "processor_share", lambda: contextlib.nullcontext(Share(0.6)))
    with pytest.raises(BusyError, match="60% of a processor"):
        tuning.tune_target(listed("cpu"), rounds=1, progress=lambda *step: pytest.fail("it went on"))


def test_tune_measures_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled and one round: that it runs and covers all kinds; its figures are for a quiet machine."""
    monkeypatch.setattr(probing, "_compiled", probing._bound)
    steps: list[tuple[str, int, int]] = []
    target = tuning.tune_target(listed("cpu"), rounds=1, progress=lambda *step: steps.append(step), anyway=True)
    assert set(target.curves) == set(KINDS)
    assert "float32, medians of 1 rounds, too few to tell their spread, " in target.measured
    assert target.measured.endswith("% of a processor")
    assert steps[-1][1] == steps[-1][2], "the bar ends full"
    assert "GFLOP/s in float32" in tuning.describe(target)
