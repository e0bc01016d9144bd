"""Graphs that begin with tokens: what follows a graph break, and encoders without their embedding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gtp_fx
from bench.counted import flops
from bench.dynamo_door import CountingDoor, Door
from gtp_fx.model import backend

from support.printed import in_one_line
from support.reference import gtp_reference, row_reference, with_everyone_back
from support.zoo import enliven

BUDGET = 0.6
ALPHA = 0.3
GUARDED = 5
"""Leading tokens that stay where nobody says how many are prefix tokens."""


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def small(depth: int = 4) -> Any:
    """A ViT of 6 x 6 patches and CLS."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=24, patch_size=4, depth=depth, embed_dim=64, num_heads=2)
    return enliven(model).eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Watched(nn.Module):
    """A ViT whose author prints in the middle of it, which Dynamo can't take into its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = small(5)  # a budget of 0.6 is met by no exact pass alone

    def forward(self, x: Tensor) -> Tensor:
        vit = self.vit
        x = vit.blocks[:2](vit._pos_embed(vit.patch_embed(x)))
        print(f"half way: {x.abs().max()}")
        logits: Tensor = vit.forward_head(vit.norm(vit.blocks[2:](x)))
        return logits


@torch.no_grad()
def test_a_print_in_the_middle_leaves_two_pieces_and_both_are_reduced() -> None:
    whole, x = Watched(), noise(3, 3, 24, 24)
    door = CountingDoor(flops_budget=BUDGET, strategy=gtp_fx.GTP(alpha=ALPHA, token_scale=True))
    found = torch.compile(whole, backend=door)(x)
    first, second = (made.schedule for made in door.made)
    assert any(first) and any(second)
    assert len(door.counted) == 2 and max(ratio for _, ratio in door.counted) <= BUDGET
    assert "the first 5 always stay" in in_one_line(str(door.made[1].report))
    # The first piece knows its grid, the second knows tokens; both return every token.
    vit = whole.vit
    half = nn.Sequential(*vit.blocks[:2])
    rest, vit.blocks = vit.blocks[2:], half
    made = gtp_reference(vit, x, schedule=first, alpha=ALPHA)
    tokens = row_reference(rest, with_everyone_back(made, vit.num_prefix_tokens), second, GUARDED, ALPHA)
    torch.testing.assert_close(found, vit.forward_head(vit.norm(tokens)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_encoder_without_its_embedding_returns_every_token() -> None:
    """Through both doors, at any batch."""
    blocks, schedule = small().blocks, [9, 0, 7, 3]
    options = {"schedule": schedule, "strategy": gtp_fx.GTP(alpha=ALPHA, token_scale=True)}
    fast = gtp_fx.optimize(blocks, example_inputs=noise(2, 37, 64), compile=False, **options)
    x = noise(3, 37, 64)
    wanted = row_reference(blocks, x, schedule, GUARDED, ALPHA)
    torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)
    through_dynamo = torch.compile(blocks, backend=Door(**options), fullgraph=True)(x)
    torch.testing.assert_close(through_dynamo, fast(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_varying_number_of_tokens_is_that_of_words() -> None:
    x = noise(2, 37, 64)
    torch._dynamo.mark_dynamic(x, 1)
    door = Door(flops_budget=BUDGET)
    with pytest.raises(Exception, match="whose number varies"):
        torch.compile(small(1).blocks, backend=door)(x)
    assert isinstance(door.refused[0], gtp_fx.UnsupportedModelError)


@pytest.mark.nightly
@torch.no_grad()
def test_prefix_tokens_can_be_said() -> None:
    blocks, x = small(2).blocks, noise(2, 37, 64)
    options: dict[str, Any] = {"schedule": [30, 5], "example_inputs": x, "compile": False}
    fast = gtp_fx.optimize(blocks, prefix_tokens=1, strategy=gtp_fx.GTP(alpha=ALPHA, token_scale=True), **options)
    torch.testing.assert_close(fast(x), row_reference(blocks, x, [30, 5], 1, ALPHA), rtol=1e-4, atol=1e-4)
    # What reads CLS has to know that there is one.
    assert any(gtp_fx.optimize(blocks, prefix_tokens=1, strategy="topk", **options).schedule)
    with pytest.raises(gtp_fx.UnsupportedModelError, match="prefix_tokens=1 says so"):
        gtp_fx.optimize(blocks, strategy="topk", **options)
    with pytest.raises(gtp_fx.OptionError, match="prefix_tokens=-1"):
        gtp_fx.optimize(blocks, prefix_tokens=-1, **options)


@pytest.mark.parametrize(
    ("strategy", "why"),
    [
        (gtp_fx.GTP(graph="spatial"), "graph='spatial' joins neighbours on a grid"),
        pytest.param("cluster", "give spatial=0", marks=pytest.mark.nightly),
        pytest.param("saliency", "it looks at the image", marks=pytest.mark.nightly),
    ],
)
def test_what_needs_a_grid_is_refused(strategy: Any, why: str) -> None:
    with pytest.raises(gtp_fx.UnsupportedModelError, match=why):
        gtp_fx.optimize(
            small(3).blocks, flops_budget=0.8, strategy=strategy, example_inputs=noise(2, 37, 64), compile=False
        )


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_of_torch(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    encoder = enliven(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)).eval()
    x = noise(2, 37, 64)
    exact = gtp_fx.optimize(encoder, flops_budget=1.0, example_inputs=x, compile=False)
    torch.testing.assert_close(exact(x), encoder(x), rtol=1e-4, atol=1e-4)
    fast = gtp_fx.optimize(encoder, flops_budget=BUDGET, example_inputs=x, compile=False)
    assert flops(fast, (x,)) <= BUDGET * flops(_eager(encoder), (x,))
    assert fast(noise(3, 37, 64)).shape == (3, 37, 64)


def _eager(encoder: nn.Module) -> Any:
    """The encoder's own operators: torch's one operator for all of a layer has no formula."""

    def run(x: Tensor) -> Any:
        with torch.enable_grad():
            return encoder(x)

    return run


@torch.no_grad()
def test_a_piece_that_cannot_be_reduced_is_compiled_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece must not stop the others; never silent."""
    monkeypatch.setattr(backend, "compile_with_inductor", lambda gm, inputs, options: gm)
    block, x = small(1).blocks[0], noise(2, 12, 64)
    compiled = torch.compile(
        block, backend=backend.gtp, options={"flops_budget": BUDGET, "strategy": "gtp", "shapes": "static"}
    )
    with pytest.warns(UserWarning, match="(?s)compiles this graph as it is: .*neighbors=8 needs more than 8"):
        found = compiled(x)
    torch.testing.assert_close(found, block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
@torch.no_grad()
def test_the_backend_compiles_pieces_by_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(backend, "compile_with_inductor", lambda gm, inputs, options: compiled.append(gm) or gm)
    whole, x = Watched(), noise(3, 3, 24, 24)
    options = {"flops_budget": BUDGET, "shapes": "static"}
    wanted = torch.compile(whole, backend=Door(**options))(x)
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as said:
        found = torch.compile(whole, backend=backend.gtp, options=options)(x)
    assert not [warning for warning in said if "backend 'gtp'" in str(warning.message)], "both pieces hold blocks"
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(compiled) == 2
    assert "half way" in capsys.readouterr().out


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_vision_tower_of_a_library_is_one_model_through_both_doors(attention: str) -> None:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, image_size=(24, 24),
        patch_size=(4, 4), attn_implementation=attention,
    )  # fmt: skip
    tower, x = enliven(InternVLVisionModel(config)).eval(), noise(3, 3, 24, 24)
    door = Door(flops_budget=BUDGET)
    found = torch.compile(tower, backend=door)(x).last_hidden_state
    fast = gtp_fx.optimize(tower, flops_budget=BUDGET, example_inputs=x, compile=False)
    assert [made.schedule for made in door.made] == [fast.schedule]
    torch.testing.assert_close(found, fast(x).last_hidden_state, rtol=1e-5, atol=1e-5)
