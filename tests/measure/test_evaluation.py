"""`gtp_fx.evaluate`: counts as by hand, intervals as published, nothing measured twice, refusals as rows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import gtp_fx
from gtp_fx.cli import app as cli
from gtp_fx.measure.evaluation import base_outputs, draw
from gtp_fx.measure.evaluation.evaluation import Evaluation
from gtp_fx.measure.evaluation.found import Found, Outputs, Sums, outputs_of
from gtp_fx.measure.evaluation.image_set import NO_LABEL, read_set
from gtp_fx.measure.evaluation.intervals import difference, mean, share
from gtp_fx.measure.evaluation.record import Record
from gtp_fx.measure.evaluation.rows import About, Row
from gtp_fx.measure.evaluation.times import Times
from gtp_fx.measure.timing import Spread
from gtp_fx.plan.damage.divergence import divergence
from gtp_fx.report import plots
from gtp_fx.strategies import GTP, ToMe

from support.printed import in_one_line
from support.tiny_vit import TinyViT

COLOURS = {"ash": (90, 90, 90), "moss": (30, 160, 60), "rust": (190, 80, 30)}


class Classifier(TinyViT):
    """Three classes, and what timm's models say of their input."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(16, classes)
        self.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(8 * super().forward(x))
        return scores


class Counting(Classifier):
    """Counts the images that its own forward has seen, outside of tracing."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            type(self).seen += len(x)
        return super().forward(x)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of each class, one colour each under noise."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(4):
            pixels = torch.tensor(colour) + 60 * torch.randn(20, 24, 3, generator=generator)
            Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(root / name / f"{i}.png")
    return root


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def quick(model: nn.Module, data: Any, **options: Any) -> Evaluation:
    return gtp_fx.evaluate(model, data, **{"budgets": [0.8], "timing": False, "batch": 5, **options})


def test_intervals_are_those_published() -> None:
    """Wilson's as R. G. Newcombe (Statistics in Medicine 17, 1998) has them in his examples; a change as A. Agresti
    (Categorical Data Analysis) has it for 1,600 pairs of which 150 were lost and 86 won."""
    for (right, of), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        found = share(right, of)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    whole = share(24, 24)
    assert whole.low < whole.value == whole.high == 1
    changed = difference(150, 86, 1600)
    assert changed.value == -0.04 and changed.low == pytest.approx(-0.059, abs=5e-4)
    assert changed.high == pytest.approx(-0.021, abs=5e-4)
    same = difference(0, 0, 50)
    assert same.value == 0 and same.low == -same.high and 0.03 < same.high < 0.08, "none of 50 isn't none of all"
    values = [1.0, 2.0, 3.0, 6.0]
    found = mean(4, sum(values), sum(value**2 for value in values))
    assert found.value == 3 and found.high - 3 == pytest.approx(1.959964 * math.sqrt(14 / 3 / 4))
    assert math.isnan(mean(1, 2.0, 4.0).low) and math.isnan(share(0, 0).value)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib isn't installed, which costs a second to import."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@torch.no_grad()
@pytest.mark.usefixtures("undrawn")
@pytest.mark.filterwarnings("ignore:.*evaluation.png wasn't drawn")
def test_a_row_is_what_a_loop_finds(pictures: Path, tmp_path: Path) -> None:
    """With labels of folders; the table and the JSON are there."""
    from gtp_fx.cli.photo import prepared

    model = Classifier().eval()
    found = quick(model, pictures, strategies=["tome", "random"], out=tmp_path / "out")
    fast = gtp_fx.optimize(model, flops_budget=0.8, strategy="random", compile=False)
    files = sorted(pictures.glob("*/*.png"))
    x = torch.cat([prepared(model, Image.open(file)) for file in files])
    label = torch.tensor([sorted(COLOURS).index(file.parent.name) for file in files])
    before, after = model(x), fast(x)
    row = found.row("random 0.8")
    assert row.sums is not None and row.flops_ratio == fast.report.flops_ratio
    right, now_right = before.argmax(1) == label, after.argmax(1) == label
    assert row.sums.counts() == {
        "images": 12,
        "original_1": int(right.sum()),
        "original_5": 12,
        "optimised_1": int(now_right.sum()),
        "optimised_5": 12,
        "same": int((before.argmax(1) == after.argmax(1)).sum()),
        "lost": int((right & ~now_right).sum()),
        "won": int((now_right & ~right).sum()),
    }
    assert row.sums.mean_divergence.value == pytest.approx(divergence(after, before), rel=1e-4)
    assert "| random 0.8" in (tmp_path / "out" / "evaluation.md").read_text()
    read = Evaluation.read(tmp_path / "out" / "evaluation.json")
    assert read is not None and str(read) == str(found) and read.rows[0].sums == found.rows[0].sums
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"][1]["estimates"]["top1"]
    assert told["value"] == int(now_right.sum()) / 12 and told["low"] < told["value"] < told["high"]


@pytest.mark.parametrize("classes", [3, pytest.param(5, marks=pytest.mark.nightly)])
def test_a_table_fits_80_columns_and_says_what_it_lacks(pictures: Path, classes: int) -> None:
    text = str(quick(Classifier(classes).eval(), pictures, strategies=["regeneration"], budgets=[0.8, 0.01]))
    assert max(map(len, text.splitlines())) <= 80
    plain = " ".join(text.split())
    assert ("accuracy, %" in plain) == (classes == 3)
    assert ("it has 3 folders and the model 5 outputs: give --class-map FILE" in plain) == (classes == 5)
    assert "No regeneration 0.01: flops_budget=0.01 can't be reached: the lowest ratio" in plain
    assert "Times were not measured; outputs are those of eager models" in plain


def test_memory_of_a_gpu_has_a_column() -> None:
    """Values made by hand; with digits enough for a large model."""
    sums = Sums.of([Found(0, True, True, False, True, False, 0.123456, 0.9876), Found(1, *[True] * 5, 1e-5, 1.0)])
    spread = Spread(1.0123, 1.2345, 1.3456)
    times = Times(512, 15, spread, 1.5, spread, 81_559 * 2**20)
    about = About("ViT", {"dtype": "bfloat16", "how": "compiled"}, "a folder", 2, "", "", Outputs.classes, 9, "a GPU")
    text = str(Evaluation(about, (Row("regeneration 0.74", {}, "", (), 0.74, sums, times),)))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"regeneration 0\.74 +0\.7400 +1234\.5 +414\.7 +1\.234× +1\.012 – 1\.346 +81559", text)
    assert "MiB: most memory of the GPU" in " ".join(text.split()) and "isn't measured" not in text


@pytest.mark.parametrize(
    ("outputs", "unlabelled", "timed", "told"),
    [
        (Outputs.classes, "", True, "top-1, %"),
        (Outputs.classes, "no labels", False, "same class as the original, %"),
        pytest.param(Outputs.features, "features", True, "cosine", marks=pytest.mark.nightly),
    ],
)
def test_the_picture(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outputs: Outputs,
    unlabelled: str,
    timed: bool,
    told: str,
) -> None:
    """A point for each row, at its share of the time (of the FLOPs where no time is known), and the original's at 1."""
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(draw, "save", lambda figure, file: (drawn.append(figure), plots.save(figure, file)))
    sums = Sums.of([Found(i, True, True, i > 0, True, i > 1, 0.1, 0.9) for i in range(4)])
    times = Times(8, 3, Spread(0.4, 0.5, 0.6), 1.0, Spread(1.8, 2.0, 2.5), None) if timed else None
    about = About("ViT", {"dtype": "float32", "how": "eager"}, "a folder", 4, "", unlabelled, outputs, 9, "cpu")
    rows = (Row("tome 0.7", {"strategy": "tome"}, "", (), 0.7, sums, times), Row("tome 0.1", {}, reason="can't"))
    Evaluation(about, rows).plot(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size[0] > 500
    (axes,) = drawn[0].axes
    points = [tuple(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_marker() in ("o", "s")]
    height = 75 if not unlabelled else 50 if outputs is Outputs.classes else 90
    assert points[0] == ((0.5 if timed else 0.7, pytest.approx(height)),) and points[1] == ((1, 100),)
    assert axes.get_ylabel().startswith(told) and ("FLOPs" in axes.get_xlabel()) == (not timed)
    with pytest.raises(gtp_fx.OptionError, match="nothing to draw"):
        Evaluation(about, rows[1:]).plot(tmp_path / "b.png")


@pytest.mark.nightly
def test_nothing_is_measured_twice(pictures: Path, tmp_path: Path) -> None:
    """Rows are added, and the original runs no more, not even for another folder of results."""
    model = Counting().eval()
    quick(model, pictures, strategies=["tome"], out=tmp_path / "out")
    seen = Counting.seen
    both = quick(model, pictures, strategies=["random"], out=tmp_path / "out")
    assert [row.name for row in both.rows] == ["random 0.8", "tome 0.8"]
    quick(model, pictures, strategies=["topk"], out=tmp_path / "elsewhere")
    assert Counting.seen - seen == 2 * 2, "each run asks once, with an example of two, what the outputs are"
    before = dict(both.about.run)
    model.head.weight.mul_(2)
    with pytest.raises(gtp_fx.OptionError, match="is of a run with weights="):
        quick(model, pictures, strategies=["random"], out=tmp_path / "out")
    again = quick(model, pictures, strategies=["tome"], out=tmp_path / "third")
    assert Counting.seen - seen > 12 and again.about.run["weights"] != before["weights"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.filterwarnings("ignore:.*evaluation.png wasn't drawn")
def test_an_evaluation_that_was_broken_off_goes_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After five of twelve images, in the middle of a line."""
    model, whole = Classifier().eval(), []
    add = Record.add

    def stop(record: Record, batch: Any) -> None:
        if record.found:
            raise KeyboardInterrupt
        add(record, batch)

    whole = quick(model, pictures).rows[0].sums
    monkeypatch.setattr(Record, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        quick(model, pictures, out=tmp_path)
    (file,) = (tmp_path / "images").iterdir()
    file.write_text(file.read_text() + "[[5, 1, 1")
    added: list[int] = []

    def count(record: Record, batch: Any) -> None:
        rows = list(batch)
        added.extend(row.place for row in rows)
        add(record, rows)

    monkeypatch.setattr(Record, "add", count)
    assert quick(model, pictures, out=tmp_path).rows[0].sums == whole
    assert added == list(range(5, 12))


@pytest.mark.nightly
def test_batches_of_ones_own() -> None:
    """A tensor, pairs with labels, and an iterator, which is used up; labels that are missing somewhere."""
    model, x = Classifier().eval(), images()
    labels = model(x).argmax(1)
    labelled = quick(model, [(x[:5], labels[:5]), (x[5:], labels[5:])]).rows[0].sums
    assert labelled is not None and labelled.original_1 == 8 and labelled.lost == 8 - labelled.optimised_1
    assert quick(model, (x, labels)).rows[0].sums == labelled
    iterated = quick(model, (pair for pair in [(x[:5], labels[:5]), (x[5:], labels[5:])]))
    assert iterated.rows[0].sums == labelled and iterated.about.images == 8
    plain = quick(model, x)
    assert plain.about.unlabelled == "the batches hold no labels" and plain.rows[0].sums is not None
    assert plain.rows[0].sums.agreement.value == labelled.optimised_1 / 8
    half = quick(model, iter([(x[:5], labels[:5]), x[5:]]))
    assert half.about.unlabelled == "not all batches hold labels"


def test_features_have_a_cosine_and_no_agreement(pictures: Path) -> None:
    model = TinyViT()
    x = images()
    found = quick(model, x, compare="features", optimised={})
    sums = found.rows[0].sums
    assert sums is not None and sums.same == 0 and 0 < sums.mean_cosine.value < 1
    fast = gtp_fx.optimize(model, flops_budget=0.8, compile=False, example_inputs=x)
    moved = (fast(x) - model(x)).double()
    by_hand = (moved.square().sum(1) / model(x).double().square().sum(1)).mean()
    assert sums.mean_divergence.value == pytest.approx(float(by_hand), rel=1e-4)
    text = " ".join(str(found).split())
    assert "cosine 95 % distance 95 %" in text and "top-1 agreement isn't defined" in text
    model.num_classes = 0  # as timm's say it
    assert outputs_of(model, model(x)) is Outputs.features
    with pytest.raises(gtp_fx.OptionError, match="compare='logits'"):
        outputs_of(model, model(x), "logits")


@pytest.mark.nightly
def test_strategies_are_named_and_models_at_hand_are_rows() -> None:
    model, x = Classifier().eval(), images()
    fast = gtp_fx.optimize(model, schedule=[3, 2], strategy=GTP(alpha=0.3), compile=False, example_inputs=x)
    found = quick(model, x, strategies={"plain": "tome", "unscaled": ToMe(token_scale=False)}, optimised={"mine": fast})
    assert [row.name for row in found.rows] == ["plain 0.8", "unscaled 0.8", "mine"]
    assert found.row("mine").schedule == (3, 2) and "alpha=0.3" in found.row("mine").strategy
    with pytest.raises(gtp_fx.OptionError, match=r"two rows are called 'tome 0\.8'"):
        quick(model, x, strategies=["tome", ToMe(token_scale=False)])
    with pytest.raises(gtp_fx.OptionError, match="nothing to evaluate"):
        quick(model, x, budgets=[])
    with pytest.raises(gtp_fx.OptionError, match=r"call model\.eval\(\)"):
        quick(model.train(), x)


def test_an_output_that_is_wrong_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimised model's; the original's own is an error."""
    from gtp_fx.measure.evaluation import session

    made = session.optimize

    def broken(*args: Any, **given: Any) -> Any:
        fast = made(*args, **given)
        if "ToMe" in str(fast.strategy):
            node = next(node for node in fast.graph_module.graph.nodes if node.op == "output")
            with fast.graph_module.graph.inserting_before(node):
                log = fast.graph_module.graph.call_function(torch.ops.aten.log.default, (node.args[0][0],))
            node.args = ((log,),)
            fast.graph_module.recompile()
        return fast

    monkeypatch.setattr(session, "optimize", broken)
    found = quick(Classifier().eval(), images(), strategies=["tome", "random"])
    assert found.row("tome 0.8").reason == "the output of tome 0.8 is not finite; are these weights whole?"
    assert found.row("random 0.8").sums is not None and "No tome 0.8: the output" in " ".join(str(found).split())


def test_a_model_card_has_the_row_of_the_model(tmp_path: Path) -> None:
    """A card of the user's own keeps the rest of its text; another model's evaluation is refused."""
    model, x = Classifier().eval(), images()
    fast = gtp_fx.optimize(model, flops_budget=0.8, compile=False, example_inputs=x)
    found = quick(model, x)
    (tmp_path / "README.md").write_text("# Mine\n\nText.\n")
    for _ in range(2):
        fast.save_pretrained(tmp_path, evaluation=found)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Mine\n\nText.\n\n<!-- gtp_fx: evaluation -->\n## Evaluation\n")
    assert text.count("## Evaluation") == 1 and "This model is the row regeneration 0.8: Regeneration(" in text
    assert re.search(r"\| regeneration 0\.8 +\| +\d", text)
    other = gtp_fx.optimize(model, schedule=[1, 0], compile=False, example_inputs=x)
    with pytest.raises(gtp_fx.OptionError, match=r"no row of this model .*\[1, 0\]"):
        other.save_pretrained(tmp_path / "other", evaluation=found)
    model.head.bias.add_(1)
    with pytest.raises(gtp_fx.OptionError, match="of other weights"):
        fast.save_pretrained(tmp_path / "other", evaluation=found)
    assert not (tmp_path / "other").exists()


def test_folders(pictures: Path, tmp_path: Path) -> None:
    """What is a label, what is none, and what is refused."""
    assert [item.label for item in read_set(pictures, 3).items] == [0] * 4 + [1] * 4 + [2] * 4
    named = read_set(pictures, 9, names={"ash": 7, "moss": 0, "rust": 2})
    assert {item.label for item in named.items} == {7, 0, 2} and not named.unlabelled
    order = tmp_path / "classes.txt"
    order.write_text("rust\nblue sky\nash\nmoss\n")
    assert [item.label for item in read_set(pictures, 4, order).items][::4] == [2, 3, 0]
    flat = read_set(pictures / "ash", 3)
    assert flat.unlabelled == "it has no class folders" and flat.items[0].label == NO_LABEL
    assert len({read_set(pictures, outputs).fingerprint for outputs in (3, 4, None)}) == 2
    some = read_set(pictures, 3).evenly(3)
    assert [item.label for item in some.items] == [0, 1, 2] and some.fingerprint != read_set(pictures, 3).fingerprint
    (tmp_path / "sub").mkdir()
    for path, outputs, file, told in (
        (tmp_path / "nowhere", 3, None, "is no folder"),
        (tmp_path / "sub", 0, None, "holds no image"),
        (pictures, 5, order, "has 4 names and the model 5 outputs: give a folder"),
    ):
        with pytest.raises(gtp_fx.OptionError, match=told):
            read_set(path, outputs, file)
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    with pytest.raises(gtp_fx.OptionError, match=r"both images \(loose\.png, …\) and sub"):
        read_set(tmp_path, 3)
    (tmp_path / "sub" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(gtp_fx.OptionError, match=r"broken\.png is no picture that Pillow reads"):
        read_set(tmp_path / "sub", 3).items[0].image()


def test_outputs_used_longest_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for two sets, the third one takes the place of the one that wasn't read since."""
    monkeypatch.setattr(base_outputs, "_MOST_BYTES", 1000)
    monkeypatch.setattr(base_outputs, "_MOST_OF_ALL", 2500)

    def use(name: str) -> int:
        kept = base_outputs.BaseOutputs(tmp_path / name, 50)
        assert kept.at([0], lambda: [torch.ones(1, 4)])[0].tolist() == [[1.0] * 4]
        return kept.ran

    for number, name in enumerate("ab"):
        assert use(name) == 1
        os.utime(tmp_path / name / "known.npy", (number, number))
    assert use("a") == 0 and use("c") == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "c"]


def test_a_record_is_of_one_run(tmp_path: Path) -> None:
    row = Found(0, True, True, False, True, False, 0.25, 0.5)
    Record.of(tmp_path / "state", {"model": "a", "dtype": "float32"}).add([row])
    assert Record.of(tmp_path / "state", {"model": "a", "dtype": "float32"}).found[0] == row
    with pytest.raises(gtp_fx.OptionError, match="of a run with dtype='float32', and this one has dtype='bfloat16'"):
        Record.of(tmp_path / "state", {"model": "a", "dtype": "bfloat16"})
    one = Sums.of([row])
    assert one.plus(dataclasses.astuple(one)) == Sums.of([row, row])


def test_the_command(pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    given = ["eval", "test_vit", "--data", str(pictures), "--flops-budget", "0.8", "--strategy", "tome", "--no-timing"]
    out = tmp_path / "out"
    done = CliRunner().invoke(cli.app, [*given, "--limit", "6", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.partition("written:")[0].splitlines())) <= 80
    assert "tome 0.8" in done.stdout and "it has 3 folders and the model 1000" in " ".join(done.stdout.split())
    assert f"written: {out / 'evaluation.json'}" in in_one_line(done.stdout) and (out / "evaluation.png").exists()
    again = CliRunner().invoke(cli.app, [*given, "--limit", "6", "--out", str(out), "--json"])
    assert json.loads(again.stdout)["rows"][0]["sums"]["images"] == 6
    for more, told in (
        (["--limit", "5", "--out", str(out)], "is of a run with data="),
        (["--mode", "max-autotune"], "nothing is compiled"),
        (["--compare", "logits"], "compare='logits'"),
    ):
        done = CliRunner().invoke(cli.app, [*given, *more])
        assert done.exit_code == 2 and told in in_one_line(done.stderr) and "Traceback" not in done.output


@pytest.mark.nightly
def test_the_command_fails_where_nothing_could_be_made(pictures: Path) -> None:
    given = ["eval", "test_vit", "--data", str(pictures), "--flops-budget", "0.02", "--limit", "2", "--no-timing"]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 1 and "can't be reached" in in_one_line(done.stdout), done.output


def test_results_of_something_else_are_replaced_where_that_is_said(tmp_path: Path) -> None:
    model, x = Classifier().eval(), torch.randn(4, 3, 16, 16)
    quick(model, x, out=tmp_path)
    for other, told in ((x[:3], "is of a run with"), (x, "holds no evaluation"), (x, "without the evaluation.json")):
        with pytest.raises(gtp_fx.OptionError, match=rf"{told}.*overwrite=True \(--overwrite\)"):
            quick(model, other, out=tmp_path)
        if told != "without the evaluation.json":
            (tmp_path / "evaluation.json").write_text("[]") if "run" in told else (
                tmp_path / "evaluation.json"
            ).unlink()
    assert quick(model, x[:3], out=tmp_path, overwrite=True).about.images == 3


def test_what_auto_chose_is_in_the_table() -> None:
    found = quick(Classifier().eval(), torch.randn(4, 3, 16, 16), strategies=["auto", "tome"])
    assert [row.label for row in found.rows] == ["auto 0.8: regeneration", "tome 0.8"]
    assert "auto 0.8: regeneration " in str(found) and "auto 0.8 is Regeneration(" in in_one_line(str(found))


def test_an_option_that_evaluate_does_not_have_is_named_with_the_nearest() -> None:
    for given, told in (
        ({"calibratoin": 1}, "did you mean 'calibration'"),
        ({"flops_budget": 0.7}, r"takes budgets=\[…\]"),
        ({"outputs": "features"}, "evaluate has no argument 'outputs'"),
    ):
        with pytest.raises(gtp_fx.OptionError, match=told):
            gtp_fx.evaluate(Classifier(), torch.randn(1, 3, 32, 32), budgets=[0.8], **given)


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
def test_compiled_models_are_timed_and_their_outputs_counted(pictures: Path, tmp_path: Path) -> None:
    """And a later run times what it adds against the original anew."""
    model = Classifier().eval()
    given = {"timing": True, "rounds": 2, "out": tmp_path}
    first = quick(model, pictures, strategies=["tome"], **given)
    plain = quick(model, pictures, strategies=["tome"]).rows[0].sums
    assert first.rows[0].sums is not None and plain is not None and first.rows[0].sums.counts() == plain.counts()
    times = first.rows[0].times
    assert times is not None and times.rounds == 2 and times.batch == 5 and times.peak_bytes is None
    assert first.about.run["how"] == "compiled"
    both = quick(model, pictures, strategies=["tome", "random"], **given)
    assert both.rows[0] == first.rows[0] and both.rows[1].times is not None
    text = " ".join(str(both).split())
    assert "compiled against compiled, medians of 2 interleaved rounds, batch 5" in text
    assert "They are of 2 runs, in which the original took" in text and "isn't measured on a CPU" in text
    assert max(map(len, str(both).splitlines())) <= 80
