"""What comes back stands in for the original: call, parameters, modes, devices, attributes; and any batch."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn

import gtp_fx

from support.printed import in_one_line
from support.zoo import BY_NAME, build, enliven, images

ROW = BY_NAME["deit3"]


pytestmark = pytest.mark.xdist_group("contract")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Not to be changed, nor what is made of it."""
    return build(ROW)


@pytest.fixture(scope="module")
def fast(model: nn.Module) -> gtp_fx.OptimizedModel:
    return gtp_fx.optimize(model, flops_budget=0.65, compile=False)


def made() -> tuple[nn.Module, gtp_fx.OptimizedModel]:
    """To be changed."""
    model = build(ROW)
    return model, gtp_fx.optimize(model, flops_budget=0.65, compile=False)


@torch.no_grad()
def test_one_graph_serves_every_batch(fast: gtp_fx.OptimizedModel) -> None:
    graph = fast.graph_module
    five = images(ROW, batch=5)
    wanted = fast(five)
    for batch in (1, 2):
        torch.testing.assert_close(fast(five[:batch]), wanted[:batch], rtol=1e-4, atol=1e-4)
    assert fast.graph_module is graph


def test_parameters_are_the_originals(model: nn.Module, fast: gtp_fx.OptimizedModel) -> None:
    assert list(fast.state_dict()) == list(model.state_dict())
    for (name, mine), (theirs_name, theirs) in zip(fast.named_parameters(), model.named_parameters(), strict=True):
        assert name == theirs_name
        assert mine is theirs


def test_gradients_flow_to_the_original() -> None:
    model, fast = made()
    fast(images(ROW)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.nightly
@torch.no_grad()
def test_loading_a_state_dict_reaches_the_graph() -> None:
    _, fast = made()
    x = images(ROW)
    other = build(ROW, seed=7)
    fast.load_state_dict(other.state_dict())
    wanted = gtp_fx.optimize(other, schedule=fast.schedule, compile=False)(x)
    torch.testing.assert_close(fast(x), wanted)


@pytest.mark.nightly
@torch.no_grad()
def test_to_moves_graph_and_parameters_together() -> None:
    _, fast = made()
    x = images(ROW)
    wanted = fast(x)
    fast.to(torch.float64)
    assert fast(x.double()).dtype == torch.float64
    torch.testing.assert_close(fast(x.double()).float(), wanted, rtol=1e-3, atol=1e-3)


def test_attributes_of_the_original_can_be_read(model: nn.Module, fast: gtp_fx.OptimizedModel) -> None:
    assert fast.pretrained_cfg == model.pretrained_cfg
    assert fast.num_features == model.num_features
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing


def test_the_original_is_left_as_it_was() -> None:
    model, x = build(ROW), images(ROW)
    model.blocks[1].train()  # a mixed state, to see that it is kept
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        wanted = model(x)
        gtp_fx.optimize(model, flops_budget=0.65, compile=False)(x)
        assert torch.equal(model(x), wanted)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_train_and_eval_are_the_originals_modes() -> None:
    """Dropout is off in evaluation, on in training, and on the original's terms."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2, proj_drop_rate=0.5, drop_path_rate=0.5)
    fast = gtp_fx.optimize(enliven(model).eval(), schedule=[30, 0], compile=False)
    x = images(BY_NAME["vit"])
    assert torch.equal(fast(x), fast(x))
    fast.train()
    assert not torch.equal(fast(x), fast(x))
    assert model.training, "one set of layers has one mode"
    fast.eval()
    assert torch.equal(fast(x), fast(x))


def test_a_deep_copy_is_independent(fast: gtp_fx.OptimizedModel) -> None:
    x = images(ROW)
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        wanted = fast(x)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(fast(x), wanted)
        assert not torch.equal(twin(x), wanted)


def test_schedules_travel_as_json(model: nn.Module, fast: gtp_fx.OptimizedModel) -> None:
    schedule = gtp_fx.Schedule.from_json(fast.schedule.to_json())
    assert schedule == fast.schedule
    again = gtp_fx.optimize(model, schedule=schedule, compile=False)
    with torch.no_grad():
        assert torch.equal(again(images(ROW)), fast(images(ROW)))


def test_the_report_reads_as_a_table(fast: gtp_fx.OptimizedModel) -> None:
    text = in_one_line(str(fast.report))
    for expected in ("budget 0.65", "drop_dead_tokens", "exact", "approximate", "blocks.0.attn", "leave out"):
        assert expected in text
    assert "dead tokens" in text, "the last block's refusal says why"
    assert fast.report.to_dict()["sites"][0]["tokens_in"] == ROW.tokens


class KeywordModel(nn.Module):
    """A model called as HuggingFace's are: by keyword, returning a mapping, its size told by a config."""

    main_input_name = "pixel_values"

    class Config:
        image_size = 32
        num_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.config = self.Config()
        self.vit = enliven(
            timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2, embed_dim=64, num_heads=2)
        )

    def forward(self, pixel_values: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        assert pixel_values is not None
        return {"logits": self.vit(pixel_values) * scale}


@pytest.fixture
def keyword() -> tuple[KeywordModel, gtp_fx.OptimizedModel]:
    model = KeywordModel().eval()
    return model, gtp_fx.optimize(model, schedule=[10, 0], compile=False)


def test_keyword_calls_and_output_types_are_kept(keyword: tuple[KeywordModel, gtp_fx.OptimizedModel]) -> None:
    _, fast = keyword
    x = torch.randn(3, 3, 32, 32)
    by_name, by_place = fast(pixel_values=x), fast(x, scale=1.0)
    assert set(by_name) == {"logits"}
    assert torch.equal(by_name["logits"], by_place["logits"])
    assert fast.config.image_size == 32


def test_another_flag_is_an_error_and_not_a_wrong_answer(
    keyword: tuple[KeywordModel, gtp_fx.OptimizedModel],
) -> None:
    with pytest.raises(gtp_fx.InputError, match="optimised for"):
        keyword[1](torch.randn(2, 3, 32, 32), scale=2.0)


def test_warnings_point_at_the_users_own_line() -> None:
    model = build(ROW, depth=2)
    model.blocks[0].drop_path1.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fast = gtp_fx.optimize(model, schedule=[8, 0], compile=False)
        fast.warm_up()
    ours = [warning for warning in told if "drop_path1" in str(warning.message) or "warm_up" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__, __file__]
