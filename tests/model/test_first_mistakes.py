"""What a newcomer gives that isn't what is wanted, and what is said about it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import gtp_fx
from gtp_fx.options.options import Options

from support.plain_vit import PlainViT

IMAGES = torch.zeros(2, 3, 24, 24)


@pytest.fixture(scope="module")
def fast() -> gtp_fx.OptimizedModel:
    return gtp_fx.optimize(PlainViT().eval(), flops_budget=0.8, example_inputs=IMAGES, compile=False)


def test_arrays_are_told_by_type_and_shape(fast: gtp_fx.OptimizedModel) -> None:
    with pytest.raises(gtp_fx.InputError, match=r"numpy\.ndarray float32\[2, 3, 24, 24\].*torch\.as_tensor") as raised:
        fast(IMAGES.numpy())
    assert len(str(raised.value)) < 300
    with pytest.raises(gtp_fx.CaptureError, match=r"example_inputs=\(numpy.ndarray float64\[2, 5\],\) hold no tensor"):
        gtp_fx.optimize(PlainViT(), flops_budget=0.8, example_inputs=(np.zeros((2, 5)),))
    with pytest.raises(gtp_fx.InputError, match=r"called with \(\[float32\[\*, 3, 24, 24\]\]\)"):
        fast([IMAGES])


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.zeros(2, 3, 48, 48), r"batch of the calibration images is \(float32\[\*, 3, 48, 48\]\).*of the size"),
        (
            [[IMAGES, torch.arange(2)]],
            r"calibration images is .*int64\[\*\]\).*\[images for images, labels in loader\]",
        ),
        (DataLoader(TensorDataset(IMAGES)), r"calibration=DataLoader.*\[images for images, labels in loader\]"),
    ],
)
def test_calibration_images_of_another_form_are_told_as_such(images: object, told: str) -> None:
    with pytest.raises(gtp_fx.GtpError, match=told):
        gtp_fx.optimize(PlainViT().eval(), flops_budget=0.8, example_inputs=IMAGES, calibration=images)


def test_a_schedules_file_does_in_python_too(fast: gtp_fx.OptimizedModel, tmp_path: Path) -> None:
    file = tmp_path / "schedule.json"
    file.write_text(fast.schedule.to_json())
    assert Options.of(schedule=file).schedule == Options.of(schedule=str(file)).schedule == fast.schedule
    with pytest.raises(gtp_fx.OptionError, match=r"no\.json' can't be read: No such file"):
        Options.of(schedule="no.json")
    file.write_text("{}")
    with pytest.raises(gtp_fx.ScheduleError, match=r"schedule\.json: not a schedule's JSON"):
        Options.of(schedule=file)


def test_a_place_that_cant_be_written_is_named(fast: gtp_fx.OptimizedModel, tmp_path: Path) -> None:
    with pytest.raises(gtp_fx.OptionError, match=r"no/x\.png: \S*no is no directory; make it first"):
        fast.report.plot(tmp_path / "no" / "x.png")
    pytest.importorskip("matplotlib")
    if sys.platform == "linux":
        with pytest.raises(gtp_fx.ExportError, match=r"^/proc/x\.pt2 can't be written: .* in /proc"):
            gtp_fx.export(fast, "/proc/x.pt2")
        with pytest.raises(gtp_fx.OptionError, match=r"^plot /proc/x\.png can't be written"):
            fast.report.plot("/proc/x.png")


def test_the_legend_of_a_report_lies_beside_the_bars(
    fast: gtp_fx.OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Figure = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    fast.report.plot(tmp_path / "x.png")
    (figure,) = drawn
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 2 and all(axes.get_legend() is None for axes in figure.axes)
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_a_misspelt_option_is_told_with_the_right_one() -> None:
    with pytest.raises(
        gtp_fx.OptionError, match=r"optimize has no argument 'flops_buget'; did you mean 'flops_budget'\?"
    ):
        gtp_fx.optimize(PlainViT(), flops_buget=0.7)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (
            IMAGES.bfloat16(),
            r"are float32, .*bfloat16\[2, 3, 24, 24\]: give images\.to\(torch\.float32\), or conv",
        ),
        (IMAGES.double(), r"called with float64.*or convert the model, model\.to\(torch\.float64\)$"),
        (IMAGES.to(torch.uint8), r"takes images\.to\(torch\.float32\), scaled and normalised"),
        (IMAGES[0], r"one image is a batch, too: image\[None\]"),
        (IMAGES.permute(0, 2, 3, 1), r"channels first: images\.permute\(0, 3, 1, 2\)"),
        (torch.zeros(2, 3, 48, 48), "dynamic_img_size=True.*sizes='any' takes any, with"),
    ],
)
def test_images_of_another_kind_are_told_with_what_to_write(
    fast: gtp_fx.OptimizedModel, images: torch.Tensor, told: str
) -> None:
    with pytest.raises(gtp_fx.InputError, match=told):
        fast(images)


def test_images_of_a_size_that_the_model_refuses_are_an_error_without_a_log(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(gtp_fx.CaptureError, match="Give example_inputs that the model accepts"):
        gtp_fx.optimize(PlainViT().eval(), flops_budget=0.8, example_inputs=torch.zeros(2, 3, 20, 20), compile=False)
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")]
