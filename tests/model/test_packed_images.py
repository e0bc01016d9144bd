"""Towers that read from a tensor of integers how large the images of their one sequence are."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gtp_fx
from bench.live_weights import enliven
from bench.towers import called_with
from bench.vision_language_models import FAMILIES, TINY, build, prompt
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_call

from support import reference_packed
from support.reference_families import Walk
from support.reference_stream import ALPHA

pytestmark = pytest.mark.xdist_group("packed-images")
GTP = gtp_fx.GTP(alpha=ALPHA, recovery="mean")
WIDTH, HEADS, PATCH = 32, 2, 12


class Packed(nn.Module):
    """Two blocks of attention over one row of patches, split by the sizes that a tensor holds: [N, P], [images, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, patches: Tensor, sizes: Tensor) -> Tensor:
        rows = torch.cat([torch.arange(int(h) * int(w)) // w for h, w in sizes])
        x = self.embed(patches) + 0.1 * rows[:, None]
        for n in range(2):
            q, k, v = self.qkv[n](self.norms[2 * n](x)).view(len(x), 3, HEADS, -1).permute(1, 2, 0, 3)
            parts = [part.split((sizes[:, 0] * sizes[:, 1]).tolist(), dim=1) for part in (q, k, v)]
            each = [nn.functional.scaled_dot_product_attention(*(p[None] for p in of_one)) for of_one in zip(*parts)]  # noqa: B905
            x = x + self.proj[n](torch.cat(each, dim=2).transpose(1, 2).reshape(len(x), -1))
            x = x + self.mlp[n](self.norms[2 * n + 1](x))
        return x


@functools.cache
def packed() -> Packed:
    return enliven(Packed()).eval()  # type: ignore[return-value]


def called(*sizes: tuple[int, int]) -> dict[str, Tensor]:
    count = sum(h * w for h, w in sizes)
    generator = torch.Generator().manual_seed(count)
    return {"patches": torch.randn(count, PATCH, generator=generator), "sizes": torch.tensor(sizes)}


@functools.cache
def fast(budget: float = 0.8, sizes: str = "any") -> gtp_fx.OptimizedModel:
    options: dict[str, Any] = {"flops_budget": budget, "sizes": sizes, "compile": False}
    return gtp_fx.optimize(packed(), example_inputs=called((4, 6)), **options)


@torch.no_grad()
def test_exact_at_budget_one_whatever_the_number_of_images() -> None:
    exact = fast(1.0)
    for sizes in (((4, 6),), ((4, 6), (3, 2))):
        torch.testing.assert_close(exact(**called(*sizes)), packed()(**called(*sizes)), atol=1e-5, rtol=1e-5)
    assert len(exact.forms) == 2  # a graph for each


@torch.no_grad()
def test_other_sizes_are_refused_by_their_values() -> None:
    only = fast(0.8, "given")
    assert only.report.sites and only.report.flops_ratio < 0.8
    assert only.report.made_for == "(float32[24, 12], int64 [[4, 6]])" and only.report.made_for in str(only.report)
    same = called((4, 6))
    assert only(**same).shape == (24, WIDTH)
    with pytest.raises(
        gtp_fx.InputError, match=r"optimised for .*\[\[4, 6\]\].* called with .*\[\[6, 4\]\].*sizes='any'"
    ):
        only(same["patches"], torch.tensor([[6, 4]]))  # as many patches
    with pytest.raises(gtp_fx.InputError, match=r"float32\[24, 12\].*float32\[48, 12\]"):
        only(**called((4, 6), (4, 6)))


def test_several_images_in_one_sequence_lose_no_tokens() -> None:
    with pytest.raises(gtp_fx.UnsupportedModelError, match="only patches of a grid are removed"):
        fast()(**called((4, 6), (4, 6)))


@torch.no_grad()
def test_a_copy_and_a_saved_model_are_for_the_same_sizes(tmp_path: Any) -> None:
    wanted = fast()(**called((4, 6)))
    fast().save_pretrained(tmp_path)
    for again in (copy.deepcopy(fast()), gtp_fx.load(tmp_path, model=enliven(Packed()).eval(), compile=False)):
        assert torch.equal(again(**called((4, 6))), wanted)
        assert next(iter(again.forms)).endswith("int64 [[4, 6]])")


def test_what_would_not_compare_the_sizes_is_refused() -> None:
    with pytest.raises(gtp_fx.ExportError, match=r"\[\[4, 6\]\]\) alone, which is compared at every call"):
        gtp_fx.exported_program(fast())
    with pytest.raises(gtp_fx.InputError, match="what traces the call doesn't know its values"):
        torch.export.export(fast(), (), called((4, 6)))


class Odd(nn.Module):
    """Does what `do` does with an image [B, N] and sizes [1]."""

    def __init__(self, do: Any) -> None:
        super().__init__()
        self.do = do

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        return self.do(x, sizes)  # type: ignore[no-any-return]


def _written(x: Tensor, sizes: Tensor) -> Tensor:
    kept = torch.zeros(3, dtype=torch.long)
    kept[: sizes[0]] = x[0, : sizes.item()].long()  # known until the image is in it
    return kept + torch.arange(3)


def _in_place(x: Tensor, sizes: Tensor) -> Tensor:
    numbers = torch.arange(3)
    before = x + numbers
    numbers.add_(sizes)
    return before * numbers + torch.ones(int(sizes[0]) + 1)


def _random(x: Tensor, sizes: Tensor) -> Tensor:
    return x[:, : sizes.item()] + 0 * torch.rand_like(sizes.float())


def _aliased(x: Tensor, sizes: Tensor) -> Tensor:
    numbers = torch.arange(3)[: sizes.item() + 1]
    view = numbers[1:]
    view += x[0, 1:].long()
    return numbers


def _input(x: Tensor, sizes: Tensor) -> Tensor:
    sizes += 1
    return x[:, : sizes.item()]


@torch.no_grad()
@pytest.mark.parametrize("do", [_written, _in_place, _random])
def test_what_is_computed_of_the_sizes_is_as_in_the_model(do: Any) -> None:
    model, inputs = Odd(do), (torch.randn(1, 3), torch.tensor([2]))
    graph, signature = capture_call(model, call_signature(model, inputs))
    assert signature.fixed and inputs[1].tolist() == [2]
    for x in (inputs[0], 9 * torch.randn(1, 3)):
        assert torch.equal(graph(x, inputs[1]), model(x, inputs[1]))


@pytest.mark.parametrize(
    ("do", "why"), [(_aliased, "of which the forward has a view"), (_input, "writes to a tensor of integers")]
)
def test_what_is_not_followed_is_refused(do: Any, why: str) -> None:
    model = Odd(do)
    with pytest.raises(gtp_fx.CaptureError, match=why):
        capture_call(model, call_signature(model, (torch.randn(1, 3), torch.tensor([2]))))


TOWERS: dict[str, tuple[Walk, tuple[int, ...]]] = {
    "Pixtral": (reference_packed.pixtral, (12, 9, 6, 5)),
    "Qwen2-VL": (reference_packed.qwen2_vl, (12, 9, 6, 5)),
    "Qwen2.5-VL": (reference_packed.qwen2_5_vl, (12, 9)),
}


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_towers_agree_with_the_method_by_hand(name: str) -> None:
    walk, schedule = TOWERS[name]
    model = build(name)
    path = FAMILIES[name](TINY).tower
    tower, inputs = model.get_submodule(path), called_with(model, path, prompt(name, batch=1))
    options: dict[str, Any] = {"example_inputs": inputs, "strategy": GTP, "compile": False}
    exact = gtp_fx.optimize(tower, flops_budget=1.0, **options)
    whole = tower(**inputs)
    for key, found in exact(**inputs).items():
        if isinstance(found, Tensor):
            torch.testing.assert_close(found, whole[key], atol=1e-5 * whole[key].abs().max().item(), rtol=0)
    shorter = gtp_fx.optimize(tower, schedule=schedule, **options)
    assert shorter.report.flops_ratio < 1
    found = shorter(**inputs)
    for key, wanted in walk(tower, inputs, schedule).items():  # type: ignore[arg-type]
        torch.testing.assert_close(found[key], wanted, atol=1e-5 * wanted.abs().max().item(), rtol=0)


@pytest.mark.nightly
def test_two_pictures_of_pixtral_never_stand_in_for_each_other() -> None:
    model, path = build("Pixtral"), FAMILIES["Pixtral"](TINY).tower
    tower, inputs = model.get_submodule(path), called_with(model, path, prompt("Pixtral", batch=2))
    with pytest.raises(gtp_fx.GtpError, match="several pictures stand in one sequence and a mask keeps them apart"):
        gtp_fx.optimize(tower, schedule=[12, 0, 0, 0], example_inputs=inputs, compile=False)
