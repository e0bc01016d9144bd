"""HuggingFace models: both doors, both attention implementations, outputs as they were, in their own pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ViTImageProcessor, pipeline

import gtp_fx
from bench.dynamo_door import Door

from support.captured import optimised, shared_model
from support.checkout import ROOT
from support.hf_models import COMMON, MODELS, SIDE, build, inputs
from support.zoo import enliven, in_groups

GUESSED = {"videomae", "vivit", "ast"}
"""Whose configuration doesn't tell a call: example_inputs are given."""

SHORTENED, THROUGH_BOTH = ("vit",), ("vit",)
"""What is tried by default; the others nightly."""


@pytest.fixture(autouse=True)
def _forget() -> None:
    """The models share their classes' code: without this, Dynamo counts them as recompilations of one."""
    torch._dynamo.reset()


def tensors(output: Any) -> dict[str, Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@dataclass(frozen=True)
class Named:
    """A model, captured by a call that its configuration tells, or by an example where that tells none."""

    name: str

    def model(self) -> nn.Module:
        return build(self.name)

    def inputs(self) -> dict[str, Tensor] | None:
        return inputs(self.name) if self.name in GUESSED else None


@torch.no_grad()
@pytest.mark.parametrize("name", [in_groups(name, f"HF {name}", nightly=name not in SHORTENED) for name in MODELS])
def test_exact_at_one_and_shorter_below(name: str) -> None:
    model, call = shared_model(Named(name)), inputs(name)
    exact, found = (optimised(Named(name), flops_budget=budget).graph_module(**call) for budget in (1.0, 0.6))
    wanted = model(**call)
    assert all(relative(tensors(exact)[key], value) < 1e-5 for key, value in tensors(wanted).items())
    assert type(found) is type(wanted)
    assert {k: v.shape for k, v in tensors(found).items()} == {k: v.shape for k, v in tensors(wanted).items()}
    assert any(relative(tensors(found)[key], value) > 1e-4 for key, value in tensors(wanted).items())


@torch.no_grad()
@pytest.mark.parametrize("name", [in_groups(name, f"HF {name}", nightly=name not in THROUGH_BOTH) for name in MODELS])
def test_one_schedule_through_both_doors(name: str) -> None:
    model, call = shared_model(Named(name)), inputs(name)
    door = Door(flops_budget=0.6)
    through_dynamo = torch.compile(model, backend=door, fullgraph=True)(**call)
    fast = optimised(Named(name), flops_budget=0.6)
    found = tensors(fast.graph_module(**call))
    (made,) = door.made
    assert made.schedule == fast.schedule
    for key, value in tensors(through_dynamo).items():
        torch.testing.assert_close(value, found[key], rtol=1e-5, atol=1e-5)


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "beit", "dinov3"])
def test_eager_attention_is_the_same_model(name: str) -> None:
    """One sum in another order: 1e-6. The schedule is the same, so the graphs are."""
    call = inputs(name)
    spelled, fused = (
        gtp_fx.optimize(build(name, attention), flops_budget=0.6, compile=False) for attention in ("eager", "sdpa")
    )
    assert spelled.schedule == fused.schedule
    operators = [str(node.target) for node in spelled.graph_module.graph.nodes]
    assert not any("softmax" in operator for operator in operators)
    for key, value in tensors(fused(**call)).items():
        assert relative(tensors(spelled(**call))[key], value) < 1e-4


@torch.no_grad()
def test_masks_that_libraries_make_of_nothing_are_gone() -> None:
    fast = gtp_fx.optimize(build("vit"), flops_budget=1.0, compile=False)
    attentions = [n for n in fast.graph_module.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert len(attentions) == 3
    assert all(node.args[3:4] in ((), (None,)) for node in attentions)


@torch.no_grad()
def test_hidden_states_come_back_at_full_length() -> None:
    model = build("vit")
    call: dict[str, Any] = {**inputs("vit"), "output_hidden_states": True}
    fast = gtp_fx.optimize(model, schedule=[20, 0, 10], example_inputs=call, compile=False)
    wanted, found = model(**call).hidden_states, fast(**call).hidden_states
    assert [state.shape for state in found] == [state.shape for state in wanted]
    assert torch.equal(found[0], wanted[0]), "nothing has left before the first block"
    assert fast.report.recovered == ("output",)
    (provenance,) = fast.provenance(**call)
    assert provenance.matrix.shape[1] == 64 - 30


@pytest.mark.nightly
def test_the_image_classification_pipeline_runs() -> None:
    model = build("vit")
    fast = gtp_fx.optimize(model, flops_budget=0.6, compile=False)
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    image = Image.open(ROOT / "gtp_fx" / "cli" / "data" / "photo.jpg")
    answers = pipeline("image-classification", model=fast, image_processor=processor)(image)
    logits = fast(**processor(image, return_tensors="pt")).logits[0].softmax(-1)
    assert [answer["score"] for answer in answers] == pytest.approx(sorted(logits.tolist(), reverse=True), rel=1e-4)


@pytest.mark.nightly
@torch.no_grad()
def test_mae_picks_patches_by_noise_and_loses_some_of_those() -> None:
    import transformers

    model = enliven(transformers.ViTMAEModel(transformers.ViTMAEConfig(**COMMON))).eval()
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def hidden(run: Any) -> Tensor:
        torch.manual_seed(0)  # the noise by which it shuffles
        found: Tensor = run(pixel_values=x).last_hidden_state
        return found

    exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs={"pixel_values": x}, compile=False)
    torch.testing.assert_close(hidden(exact), hidden(model), rtol=1e-4, atol=1e-4)
    fast = gtp_fx.optimize(model, flops_budget=0.9, example_inputs={"pixel_values": x}, compile=False)
    assert fast.report.flops_ratio <= 0.9 and fast.sites
    assert hidden(fast).shape == hidden(model).shape
