"""Models that return token maps get them at full resolution, by `recover`, which leaves kept tokens as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import gtp_fx

from support.captured import Built, optimised, shared_model
from support.hf_models import COMMON
from support.hf_models import enliven as enliven_hf
from support.reference import gtp_reference, with_everyone_back
from support.zoo import enliven, in_tiers

SMALL = {"depth": 4, "embed_dim": 64, "num_heads": 4, "img_size": 64, "patch_size": 8}
GRID = 8


def vit(**kwargs: Any) -> nn.Module:
    return enliven(timm.create_model("vit_tiny_patch16_224", **SMALL, **kwargs)).eval()


class Intermediates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = vit()

    def forward(self, x: Tensor) -> Any:
        return self.vit.forward_intermediates(x, indices=[0, 3], norm=False)


class Dense(nn.Module):
    """A map of channels over the grid, as a segmentation head reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = vit(num_classes=0, global_pool="")
        self.head = enliven(nn.Conv2d(64, 5, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit(x)[:, 1:]
        return self.head(tokens.transpose(1, 2).reshape(-1, 64, GRID, GRID))


def dpt() -> nn.Module:
    config = transformers.DPTConfig(
        **{**COMMON, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16,
        is_hybrid=False,
    )
    return enliven_hf(transformers.DPTForDepthEstimation(config)).eval()


def depth_anything() -> nn.Module:
    backbone = transformers.Dinov2Config(
        **{**COMMON, "num_hidden_layers": 4},
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=64,
        neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16,
    )
    return enliven_hf(transformers.DepthAnythingForDepthEstimation(config)).eval()


MODELS = {
    "features_only": lambda: enliven(timm.create_model("vit_tiny_patch16_224", features_only=True, **SMALL)).eval(),
    "forward_intermediates": Intermediates,
    "head of convolutions": Dense,
    "dpt": dpt,
    "depth anything": depth_anything,
}


def maps(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", in_tiers(MODELS, "head of convolutions", "dpt", "depth anything"))
def test_full_resolution_and_exact_where_nothing_left(name: str, x: Tensor) -> None:
    source = Built(MODELS[name], (3, 64, 64))
    wanted = maps(shared_model(source)(x))
    exact = maps(optimised(source, flops_budget=1.0).graph_module(x))
    fast = optimised(source, schedule=[10, 10, 0, 10])
    found = maps(fast.graph_module(x))
    assert fast.report.recovered
    assert [t.shape for t in found] == [t.shape for t in wanted]
    for mine, theirs, full in zip(found, wanted, exact, strict=True):
        assert (full - theirs).abs().max() <= 1e-5 * theirs.abs().max()
        assert mine.isfinite().all()
    assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(found, wanted, strict=True))


@pytest.mark.nightly
@torch.no_grad()
def test_tokens_that_stayed_are_where_they_were_and_the_others_are_made_of_them(x: Tensor) -> None:
    """Seen on the stream itself, just before it is recovered."""
    model = vit(num_classes=0, global_pool="")
    strategy = gtp_fx.GTP(recovery="mean")
    fast = gtp_fx.optimize(model, schedule=[10, 10, 0, 10], strategy=strategy, example_inputs=x, compile=False)
    (output,) = (node for node in fast.graph_module.graph.nodes if node.op == "output")
    short = output.all_input_nodes[0]
    while short.target is torch.ops.gtp_fx.recover.default:
        short = short.args[0]
    seen: list[Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n is short:
                seen.append(value)
            return value

    Watch(fast.graph_module).run(x)
    (stream,) = seen
    whole = fast(x)
    (provenance,) = fast.provenance(x)
    at = provenance.index[..., None].expand(-1, -1, 64)
    assert torch.equal(whole[:, 1:].gather(1, at), stream[:, 1:])
    assert torch.equal(whole[:, :1], stream[:, :1])
    low, high = stream[:, 1:].amin(1, keepdim=True), stream[:, 1:].amax(1, keepdim=True)
    assert bool(((whole[:, 1:] >= low - 1e-5) & (whole[:, 1:] <= high + 1e-5)).all()), "means of what stayed"


@torch.no_grad()
@pytest.mark.parametrize("class_token", in_tiers([True, False], True))
def test_tokens_that_left_are_what_they_were_changed_as_their_neighbours_were(x: Tensor, class_token: bool) -> None:
    model = vit(num_classes=0, global_pool="", class_token=class_token)
    schedule = [10, 20, 0, 10]
    told = gtp_fx.GTP(token_scale=True)
    fast = gtp_fx.optimize(model, schedule=schedule, strategy=told, example_inputs=x, compile=False)
    made = gtp_reference(model, x, schedule=schedule)
    wanted = model.norm(with_everyone_back(made, model.num_prefix_tokens))
    found = fast(x)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    mean = gtp_fx.GTP(recovery="mean", token_scale=True)
    other = gtp_fx.optimize(model, schedule=schedule, strategy=mean, example_inputs=x, compile=False)(x)
    assert (found - other).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.nightly
@torch.no_grad()
def test_states_between_sites_are_recovered_as_streams_too(x: Tensor) -> None:
    """A hidden state behind the first block, and the last one: by hand on the model cut there."""
    model = MODELS["forward_intermediates"]()
    told = gtp_fx.GTP(token_scale=True)
    fast = gtp_fx.optimize(model, schedule=[10, 0, 10, 0], strategy=told, example_inputs=x, compile=False)
    _, found = fast(x)
    for state, schedule in zip(found, ([10], [10, 0, 10, 0]), strict=True):
        cut = copy.deepcopy(model.vit)
        cut.blocks = cut.blocks[: len(schedule)]
        made = gtp_reference(cut, x, schedule=schedule)
        wanted = with_everyone_back(made, 1)[:, 1:].transpose(1, 2).reshape(state.shape)
        assert (state - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.nightly
@torch.no_grad()
def test_a_map_tapped_before_the_first_site_is_the_originals(x: Tensor) -> None:
    model = MODELS["forward_intermediates"]()
    fast = gtp_fx.optimize(model, schedule=[0, 10, 10, 0], example_inputs=x, compile=False)
    torch.testing.assert_close(maps(fast(x))[1], maps(model(x))[1])
