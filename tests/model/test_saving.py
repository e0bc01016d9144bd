"""Models saved whole: what `load` returns is the saved one, bit for bit, or what differs is told by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import prune

import gtp_fx
from gtp_fx.model.saving.record import Record
from gtp_fx.plan import make_plan
from gtp_fx.strategies import Grouping, Groups, Tokens, dropped, register_strategy

from support.hf_models import build, inputs
from support.programs import run_program
from support.small_models import NAME, noise
from support.tiny_vit import TinyViT, pictures
from support.zoo import enliven


class Shared(TinyViT):
    """Two layers share a weight, one module stands twice, and a buffer is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].qkv.weight = self.blocks[0].qkv.weight
        self.blocks[1].out = self.blocks[0].out
        self.register_buffer("shift", torch.zeros(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shift


def tiny(model: nn.Module, **options: object) -> gtp_fx.OptimizedModel:
    given = {"schedule": [5, 0], "compile": False, "example_inputs": pictures().to(next(model.parameters()).dtype)}
    return gtp_fx.optimize(model, **{**given, **options})  # type: ignore[arg-type]


def edit(folder: Path, **fields: object) -> None:
    file = folder / "gtp_fx.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@torch.no_grad()
def test_a_model_of_timms_is_built_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it was built with, as far as its attributes tell; and nothing is planned again."""
    given = {"num_classes": 7, "in_chans": 1, "img_size": 96, "global_pool": "avg"}
    model, images = enliven(timm.create_model(NAME, **given)).eval(), noise()[:, :1, :96, :96]
    strategy = gtp_fx.ToMe(token_scale=False)
    fast = gtp_fx.optimize(model, compile=False, strategy=strategy, flops_budget=0.8, calibration=images)
    fast.save_pretrained(tmp_path / "new" / "folder")
    monkeypatch.delattr(make_plan, "_choose")
    again = gtp_fx.load(str(tmp_path / "new" / "folder"))
    assert torch.equal(again(images), fast(images))
    assert (again.schedule, again.strategy) == (fast.schedule, fast.strategy) and not again.training
    assert again.pretrained_cfg == model.pretrained_cfg


@pytest.mark.nightly
def test_what_no_attribute_tells_is_found_in_the_forward(tmp_path: Path) -> None:
    model = timm.create_model(NAME, depth=2, act_layer=nn.SiLU)
    with pytest.warns(
        UserWarning, match=r"isn't built by timm's name 'test_vit.* will need it, built as it was"
    ) as told:
        gtp_fx.optimize(model, flops_budget=0.8, compile=False).save_pretrained(tmp_path)
    assert [each.filename for each in told if "timm's name" in str(each.message)] == [__file__]
    with pytest.raises(
        gtp_fx.LoadError, match=r"isn't built by a name of timm's.* alone: give model=, built as it was"
    ):
        gtp_fx.load(tmp_path)
    with pytest.raises(gtp_fx.LoadError, match=r"another forward: aten\.gelu\.default 0 times then and 2 now"):
        gtp_fx.load(tmp_path, timm.create_model(NAME, depth=2))


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_shared_or_in_no_state_dict(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Shared().to(dtype)
    model.shift += torch.arange(16)
    fast, x = tiny(model), pictures(3).to(dtype)
    fast.save_pretrained(tmp_path)
    other = Shared().to(dtype)
    enliven(other)
    held = dict(other.named_parameters())
    again = gtp_fx.load(tmp_path, other)
    assert torch.equal(again(x), fast(x))
    assert all(parameter is held[name] for name, parameter in again.named_parameters())
    again.blocks[0].qkv.weight.mul_(2)
    assert torch.equal(again.blocks[1].qkv.weight, model.blocks[1].qkv.weight * 2)
    with pytest.raises(gtp_fx.LoadError, match="a Shared isn't built by a name"):
        gtp_fx.load(tmp_path)


@torch.no_grad()
def test_the_folder_is_one_of_hugging_faces_too(tmp_path: Path) -> None:
    model, x = build("vit", "eager"), inputs("vit")
    fast = gtp_fx.optimize(model, flops_budget=0.7, compile=False)
    graph, before = fast.graph_module, dict(vars(model.config))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of another save")
    fast.save_pretrained(tmp_path, max_shard_size="200KB")
    assert fast.graph_module is graph and vars(model.config) == before, "saving changes nothing"
    names = {file.name for file in tmp_path.iterdir()}
    assert {"preprocessor_config.json", "model.safetensors.index.json", "config.json"} < names
    assert "gtp_fx.safetensors" not in names, "no weight is written twice, whatever it is called there"
    fast.save_pretrained(tmp_path)
    assert not any("-of-" in file.name for file in tmp_path.iterdir())
    again = gtp_fx.load(tmp_path)
    assert type(again).__name__ == "ViTForImageClassification" and again.config._attn_implementation == "eager"
    assert torch.equal(again(**x).logits, fast(**x).logits)
    original = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(original.eval()(**x).logits, model(**x).logits)


@torch.no_grad()
def test_another_model_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    class Wider(TinyViT):
        pass

    class Summed(TinyViT):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 3

    tiny(TinyViT()).save_pretrained(tmp_path)
    wider, summed = Wider(), Summed()
    wider.blocks[1].out = nn.Linear(16, 16, bias=False)
    summed.__class__.__name__ = "TinyViT"
    cases = [
        (wider, r"the class Wider, not TinyViT; no blocks\.1\.out\.bias"),
        (TinyViT().half(), r"cls of float16\[1, 1, 16\], not float32\[1, 1, 16\]"),
        (TinyViT(depth=3), r"blocks\.2\.norm\.weight, which that had not"),
        (TinyViT().to("meta"), "its cls is on the meta device"),
        (torch.compile(tiny(TinyViT())), "give the nn.Module that gtp_fx.optimize was given"),
        (summed, r"another forward: aten\.mul\.Tensor 0 times then and 1 now"),
    ]
    for model, told in cases:
        before = [] if next(model.parameters()).is_meta else [p.clone() for p in enliven(model).parameters()]
        with pytest.raises(gtp_fx.LoadError, match=told):
            gtp_fx.load(tmp_path, model)
        assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.nightly
@torch.no_grad()
def test_layers_with_calls_of_their_own_stay_so(tmp_path: Path) -> None:
    """What no pass joined, for a hook that was there, isn't joined afterwards; and that hooks are code is told."""
    model = TinyViT()
    handle = model.blocks[0].qkv.register_forward_hook(lambda *_: None)
    fast = tiny(model)
    with pytest.warns(UserWarning, match=r"hooks on blocks\.0\.qkv aren't saved"):
        fast.save_pretrained(tmp_path)
    handle.remove()
    again = gtp_fx.load(tmp_path, TinyViT())
    assert again._gtp.own_calls == fast._gtp.own_calls >= {"blocks.0.qkv"}
    assert torch.equal(again(pictures()), fast(pictures()))


@pytest.mark.nightly
@torch.no_grad()
def test_what_has_been_put_in_a_layers_place_since_counts(tmp_path: Path) -> None:
    fast = tiny(TinyViT())
    fast.blocks[0].mlp[2] = nn.SiLU()
    prune.l1_unstructured(fast.blocks[1].out, "weight", 0.5)
    fast.save_pretrained(tmp_path)
    other = TinyViT()
    prune.identity(other.blocks[1].out, "weight")
    with pytest.raises(gtp_fx.LoadError, match=r"gelu\.default 1 times then and 2 now; aten\.silu"):
        gtp_fx.load(tmp_path, other)
    other.blocks[0].mlp[2] = nn.SiLU()
    assert torch.equal(gtp_fx.load(tmp_path, other)(pictures()), fast(pictures()))


@torch.no_grad()
def test_a_save_that_is_broken_off_leaves_the_last_one_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyViT()
    fast = tiny(model)
    fast.save_pretrained(tmp_path)
    wanted = fast(pictures())
    model.places.zero_()

    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Record, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            fast.save_pretrained(tmp_path)
    assert torch.equal(gtp_fx.load(tmp_path, TinyViT())(pictures()), wanted)
    replace = Path.replace
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda a, b: stopped() if a.name.endswith("json") else replace(a, b))
        with pytest.raises(KeyboardInterrupt):
            fast.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(gtp_fx.LoadError, match=r"has no gtp_fx\.json"):
        gtp_fx.load(tmp_path, TinyViT())


def test_files_that_are_not_what_was_saved(tmp_path: Path) -> None:
    tiny(TinyViT()).save_pretrained(tmp_path)
    weights, record = tmp_path / "model.safetensors", (tmp_path / "gtp_fx.json").read_text()
    whole = weights.read_bytes()
    for content, told in ((whole[:-8], "can't be read"), (whole[:-1] + b"\1", "aren't those that were saved")):
        weights.write_bytes(content)
        with pytest.raises(gtp_fx.LoadError, match=told):
            gtp_fx.load(tmp_path, TinyViT())
    weights.write_bytes(whole)
    named = {"timm": NAME, "args": {"checkpoint_path": "x"}}
    (form,) = json.loads(record)["forms"]
    another = {**form, "graph": {"operators": {}, "digest": ""}}
    for fields, told in (
        ({"format": 0}, "of format 0, and this gtp_fx reads format 1"),
        ({"forms": [{"graph": {}}], "files": ["../x"]}, "no record of a saved model, by its forms, files"),
        ({"forms": [{**form, "schedule": {"version": 1}}]}, "schedule of version 1"),
        ({"recipe": named, "model": "VisionTransformer"}, "built with checkpoint_path, which is no part of a model"),
        ({"recipe": {"timm": "hf-hub:some/model", "args": {}}}, "has no model 'hf-hub:some/model'"),
        ({"versions": {"gtp_fx": "0", "torch": "1"}, "forms": [another]}, "torch 1 then and"),
    ):
        (tmp_path / "gtp_fx.json").write_text(record)
        edit(tmp_path, **fields)
        with pytest.raises(gtp_fx.GtpError, match=told):
            gtp_fx.load(tmp_path, TinyViT() if "recipe" not in fields else None)


@pytest.mark.nightly
@torch.no_grad()
def test_sizes_and_taps_are_saved_too(tmp_path: Path) -> None:
    options = {"depth": 2, "dynamic_img_size": True}
    model = enliven(timm.create_model(NAME, **options)).eval()
    small, large = noise(2)[:, :, :96, :96], noise(2)
    fast = gtp_fx.optimize(
        model, flops_budget=0.8, example_inputs=[small, large], sizes="any", taps=["blocks.0"], compile=False
    )
    fast.save_pretrained(tmp_path)
    again = gtp_fx.load(tmp_path, timm.create_model(NAME, **options).eval())
    assert [form.schedule for form in again.forms.values()] == [form.schedule for form in fast.forms.values()]
    for x in (small, large):
        output, tapped = fast.with_taps(x)
        assert torch.equal(again(x), output) and torch.equal(again.with_taps(x)[1]["blocks.0"], tapped["blocks.0"])
    between = noise(2)[:, :, :128, :128]  # planned by the budget
    assert torch.equal(again(between), fast(between))


class Packed(torch.Tensor):
    """A kind of tensor that safetensors doesn't know."""


def test_what_cannot_be_in_files_is_refused(tmp_path: Path) -> None:
    @register_strategy
    @dataclass(frozen=True)
    class OfACell(Grouping):
        name: ClassVar[str] = "of_a_cell"

        def group(self, tokens: Tokens) -> Groups:
            return dropped(tokens.patches_BnC.norm(dim=-1), tokens.removed)

    fast = tiny(TinyViT(), strategy="of_a_cell")
    with pytest.raises(gtp_fx.OptionError, match="'of_a_cell' was registered in a notebook, a function or twice"):
        fast.save_pretrained(tmp_path)
    fast = tiny(TinyViT())
    for options, told in (({"push_to_hub": True}, "leave it out"), ({"depth": 1}, "takes no depth for a TinyViT")):
        with pytest.raises(gtp_fx.SaveError, match=told):
            fast.save_pretrained(tmp_path, **options)
    fast.blocks[0].out.weight = nn.Parameter(torch.randn(16, 16).as_subclass(Packed), requires_grad=False)
    with pytest.raises(gtp_fx.SaveError, match=r"blocks\.0\.out\.weight is a Packed"):
        fast.save_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(gtp_fx.SaveError, match=r"file.*nothing that can be loaded"):
        tiny(TinyViT()).save_pretrained(tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.nightly
def test_examples_that_are_no_tensors(tmp_path: Path) -> None:
    class Scaled(TinyViT):
        def forward(self, x: Tensor, scales: list[Tensor], mode: dict[str, float], **flags: bool) -> Tensor:  # type: ignore[override]
            return super().forward(x) * scales[0].sum(1, keepdim=True) * mode["by"]

    given = (pictures(), [torch.ones(2, 3)], {"by": 2.0})
    fast = gtp_fx.optimize(Scaled(), schedule=[5, 0], compile=False, example_inputs=given)
    fast.save_pretrained(tmp_path)
    again = gtp_fx.load(tmp_path, Scaled())
    assert torch.equal(again(*given), fast(*given))
    with pytest.raises(gtp_fx.InputError):
        again(given[0], given[1], {"by": 3.0})


STRATEGY = """
from dataclasses import dataclass, replace
from typing import ClassVar
from gtp_fx.strategies import Grouping, dropped, register_strategy

@register_strategy
@dataclass(frozen=True)
class Norms(Grouping):
    name: ClassVar[str] = "norms"
    power: float = 2.0

    def group(self, tokens):
        return dropped(tokens.patches_BnC.norm(self.power, dim=-1), tokens.removed)
"""
SAVING = """
import norms, timm, torch, gtp_fx
torch.manual_seed(0)
model = timm.create_model("test_vit").eval()
fast = gtp_fx.optimize(model, flops_budget=0.8, strategy=norms.Norms(power=3.0), compile=False)
x = torch.randn(3, 3, 160, 160)
fast.save_pretrained("saved")
torch.save((x, fast(x).detach()), "wanted.pt")
"""
LOADING = """
import sys, torch, gtp_fx
try:
    gtp_fx.load("saved")
except gtp_fx.OptionError as error:
    assert "strategy 'norms' is not registered here" in str(error)
import norms
x, wanted = torch.load("wanted.pt")
try:
    fast = gtp_fx.load("saved")
except gtp_fx.OptionError as error:
    sys.exit(0 if "register the same code" in str(error) and "other" in sys.argv else str(error))
assert "other" not in sys.argv and torch.equal(fast(x), wanted) and fast.strategy == norms.Norms(power=3.0)
"""


@pytest.mark.nightly
def test_another_process_loads_it_with_the_same_code_alone(tmp_path: Path) -> None:
    for name, text in (("norms", STRATEGY), ("saving", SAVING), ("loading", LOADING)):
        (tmp_path / f"{name}.py").write_text(text)
    run_program(tmp_path / "saving.py", cwd=tmp_path)
    run_program(tmp_path / "loading.py", cwd=tmp_path)
    (tmp_path / "norms.py").write_text(f"{STRATEGY}\n# changed\n")
    run_program(tmp_path / "loading.py", "other", cwd=tmp_path)


@pytest.mark.nightly
@torch.no_grad()
def test_adapters(tmp_path: Path) -> None:
    """A model whose own save_pretrained writes its adapters alone is saved whole beside."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["qkv"], init_lora_weights=False)

    def adapted() -> nn.Module:
        return peft.get_peft_model(enliven(timm.create_model(NAME, depth=2)).eval(), config).eval()  # type: ignore[no-any-return]

    fast = gtp_fx.optimize(adapted(), flops_budget=0.8, compile=False, example_inputs=noise())
    fast.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert torch.equal(gtp_fx.load(tmp_path, adapted())(noise()), fast(noise()))
    with pytest.raises(gtp_fx.LoadError, match="a PeftModel isn't built by a name"):
        gtp_fx.load(tmp_path)


@pytest.mark.nightly
def test_how_it_is_compiled_is_saved(tmp_path: Path) -> None:
    tiny(TinyViT(), compile=True, mode="max-autotune-no-cudagraphs").save_pretrained(tmp_path)
    again = gtp_fx.load(tmp_path, TinyViT())  # which compiles nothing yet
    assert again._gtp.compile and again._gtp.options.mode == "max-autotune-no-cudagraphs"
    assert not gtp_fx.load(tmp_path, TinyViT(), compile=False)._gtp.compile


@pytest.mark.nightly
def test_a_target_needs_a_name(tmp_path: Path) -> None:
    target = gtp_fx.targets.TARGETS["h100"]
    tiny(TinyViT(), target="h100").save_pretrained(tmp_path)
    assert gtp_fx.load(tmp_path, TinyViT())._gtp.options.target.name == "h100"
    with pytest.raises(gtp_fx.SaveError, match="target 'mine' has no name that a file could have"):
        tiny(TinyViT(), target=replace(target, name="mine")).save_pretrained(tmp_path)
