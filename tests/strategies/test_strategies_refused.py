"""A user's faulty strategies are refused, naming class and remedy, when a model is optimised; edits are noticed."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import gtp_fx

from support.zoo import BY_NAME, build, images

CLIP = BY_NAME["clip"]


def optimized(strategy: Any, **options: Any) -> nn.Module:
    options = options or {"schedule": [20, 10, 0]}
    return gtp_fx.optimize(build(CLIP), strategy=strategy, compile=False, **options)


@gtp_fx.strategies.register_strategy
@dataclass(frozen=True)
class Wrong(gtp_fx.strategies.Grouping):
    """Goes wrong in the way of that name."""

    name: ClassVar[str] = "wrong"
    way: str = ""

    def group(self, tokens: gtp_fx.strategies.Tokens) -> gtp_fx.strategies.Groups:
        score = tokens.patches_BnC.float().norm(dim=-1)
        groups = gtp_fx.strategies.dropped(score, tokens.removed)
        kept, left = groups.kept_BK, groups.removed_BP
        if self.way == "unsorted":
            return gtp_fx.strategies.Groups(kept.flip(1), left)
        if self.way == "twice":
            return gtp_fx.strategies.Groups(
                torch.arange(kept.shape[1]).expand_as(kept), torch.arange(left.shape[1]).expand_as(left)
            )
        if self.way == "counts":
            return gtp_fx.strategies.Groups(kept[:, 1:], left)
        if self.way == "dtype":
            return gtp_fx.strategies.Groups(kept.int(), left)
        if self.way == "prefix":
            return gtp_fx.strategies.Groups(kept + tokens.prefix, left + tokens.prefix)
        if self.way == "item":
            return gtp_fx.strategies.dropped(score * score.max().item(), tokens.removed)
        if self.way == "in place":
            tokens.x_BNC.mul_(1.0)
        if self.way == "by chance":
            return gtp_fx.strategies.dropped(torch.rand_like(score), tokens.removed)
        return groups


WAYS = {
    "unsorted": r"Wrong\.group\(\) gave kept \[.*and indices ascend",
    "twice": r"aren't together the \d+ patches",
    "counts": r"gave kept of \(1, \d+\) in torch.int64, and it has to be \(1, \d+\)",
    "dtype": r"in torch.int32, and it has to be .* in torch.int64",
    "prefix": r"aren't together the \d+ patches, numbered from 0 behind the prefix tokens",
    "item": r"Wrong\.group\(\) failed: .*no \.item\(\)",
    "in place": "changed a tensor that it was given in place",
    "by chance": "gave other kept for the same tokens the second time",
}


@pytest.mark.parametrize("way", WAYS)
def test_wrong_groups_are_named(way: str) -> None:
    with pytest.raises(gtp_fx.OptionError, match=WAYS[way]):
        optimized(Wrong(way=way))


OPTIONS: dict[str, Callable[[], Any]] = {
    r"TopK\(score='none'\): topk ranks by attention; its own is 'cls-mean'": lambda: gtp_fx.TopK(score="none"),
    r"ToMe\(score='cls-mean'\): tome doesn't rank by attention": lambda: gtp_fx.ToMe(score="cls-mean"),
    r"ToMe\(token_scale=2\): give True or False": lambda: gtp_fx.ToMe(token_scale=2),  # type: ignore[arg-type]
    r"Regeneration\(difficulty=-1\): give a finite number": lambda: gtp_fx.strategies.Regeneration(difficulty=-1),
    r"Regeneration\(branch_mean=2\): give a number from 0 to 1": lambda: gtp_fx.strategies.Regeneration(branch_mean=2),
    r"Random\(seed=0\.5\): give an integer": lambda: gtp_fx.strategies.Random(seed=0.5),  # type: ignore[arg-type]
    r"gamma and beta are finite": lambda: gtp_fx.strategies.Halting(gamma=float("nan")),
    r"feature=-1\): give the number of a channel": lambda: gtp_fx.strategies.Halting(feature=-1),
    r"fused=2\.5\): give an integer": lambda: gtp_fx.strategies.Saliency(fused=2.5),  # type: ignore[arg-type]
    r"after and spatial are 0 or more": lambda: gtp_fx.strategies.Cluster(spatial=float("nan")),
    r"Halting\(feature=9999\): tokens here have \d+ features": lambda: optimized(
        gtp_fx.strategies.Halting(feature=9999)
    ),
}


@pytest.mark.parametrize("message", OPTIONS)
def test_options_that_mean_nothing_are_named(message: str) -> None:
    with pytest.raises(gtp_fx.GtpError, match=message):
        OPTIONS[message]()


@pytest.mark.nightly
def test_any_integer_is_a_seed() -> None:
    first, second = (optimized(gtp_fx.strategies.Random(seed=seed))(images(CLIP)) for seed in (10**30, -7))
    assert not torch.equal(first, second)


@gtp_fx.strategies.register_strategy
@dataclass(frozen=True)
class Places(gtp_fx.strategies.Grouping):
    name: ClassVar[str] = "places"
    at: tuple[Any, ...] = (0, 7)

    def positions(self, blocks: int) -> tuple[Any, ...]:
        return self.at

    def group(self, tokens: gtp_fx.strategies.Tokens) -> gtp_fx.strategies.Groups:
        return gtp_fx.strategies.dropped(tokens.patches_BnC.norm(dim=-1), tokens.removed)


def test_places_that_are_none_and_fields_that_can_not_travel() -> None:
    with pytest.raises(gtp_fx.OptionError, match=r"at blocks 7 of a stream that has 3: Places\.positions\(3\)"):
        optimized(Places())
    with pytest.raises(gtp_fx.OptionError, match="written down and read again"):
        optimized(Places(at=(0, (1,))))
    with pytest.raises(gtp_fx.OptionError, match="fields travel with the graph as JSON"):
        optimized(Places(at=(0, {1})))


def test_classes_that_can_not_be_registered() -> None:
    @dataclass(frozen=True)
    class Empty(gtp_fx.strategies.Grouping):
        name: ClassVar[str] = "empty"

    @dataclass(frozen=True)
    class Returning(Places):
        name: ClassVar[str] = "returning"
        restores_tokens: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Early(Places):
        name: ClassVar[str] = "early"
        before_attention: ClassVar[bool] = True
        score: str = "cls-mean"

    @dataclass(frozen=True)
    class Umlaut(Places):
        name: ClassVar[str] = "größe"

    for cls, message in (
        (Empty, r"Empty has no group\(\)"),
        (Returning, r"Returning has no put_back\(\): with restores_tokens = True"),
        (Early, "before_attention = True lets tokens leave before there are scores"),
        (Umlaut, "give a class variable such as name"),
    ):
        with pytest.raises(gtp_fx.OptionError, match=message):
            gtp_fx.strategies.register_strategy(cls)


def edited(reverse: bool) -> type[gtp_fx.strategies.Grouping]:
    """The same class with another body, as a user edits it in a notebook."""
    body = f"return gtp_fx.strategies.dropped({'-' if reverse else ''}tokens.patches_BnC.norm(dim=-1), tokens.removed)"
    source = f"""
@gtp_fx.strategies.register_strategy
@dataclass(frozen=True)
class Edited(gtp_fx.strategies.Grouping):
    name: ClassVar[str] = "edited"

    def group(self, tokens):
        {body}
"""
    space: dict[str, Any] = {"gtp_fx": gtp_fx, "dataclass": dataclass, "ClassVar": ClassVar, "__name__": __name__}
    exec(source, space)
    cls: type[gtp_fx.strategies.Grouping] = space["Edited"]
    return cls


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
@torch.no_grad()
def test_code_that_was_edited_is_other_code() -> None:
    """An optimised model keeps the code that it was optimised with; a new one, compiled or not, has the new code."""
    x = images(CLIP)
    edited(reverse=False)
    first = gtp_fx.optimize(build(CLIP), strategy="edited", schedule=[20, 0, 0])
    before = first(x)
    edited(reverse=True)
    second = gtp_fx.optimize(build(CLIP), strategy="edited", schedule=[20, 0, 0])
    after = second(x)
    eager = gtp_fx.optimize(build(CLIP), strategy="edited", schedule=[20, 0, 0], compile=False)(x)
    torch.testing.assert_close(after, eager, rtol=1e-4, atol=1e-4)
    assert (before - after).abs().max() > 1e-3 * before.abs().max()
    assert torch.equal(first(x), before)
    assert first.strategy.code != second.strategy.code


def test_a_modules_code_has_one_key_until_a_file_of_its_package_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that another process can read a saved graph, and an edited helper is other code to a compiler's cache."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = tmp_path / "mine_keyed"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "norm.py").write_text(
        """
import sys
from dataclasses import dataclass
from typing import ClassVar
from gtp_fx.strategies import Grouping, keys, register_strategy

@register_strategy
@dataclass(frozen=True)
class Keyed(Grouping):
    name: ClassVar[str] = "keyed"
    def group(self, tokens):
        ...

code = keys._code(sys._getframe())
"""
    )

    def imported(helper: str) -> ModuleType:
        (package / "helper.py").write_text(helper)
        sys.modules.pop("mine_keyed.norm", None)
        return importlib.import_module("mine_keyed.norm")

    first, again, edited = imported("LEAST = 1"), imported("LEAST = 1"), imported("LEAST = 2")
    assert first.Keyed().code == f"keyed:{first.code}" and first.code == again.code != edited.code
    assert again.Keyed().code != first.Keyed().code, "two classes in one process, whose values aren't equal"


@pytest.mark.nightly
def test_a_cell_that_is_run_twice_registers_twice() -> None:
    """The same code is another class, of which a value isn't equal to the first one's."""
    for _ in range(2):
        edited(reverse=False)
        assert optimized("edited").report.sites


def test_a_graph_of_code_that_is_not_here_says_so() -> None:
    fast = optimized(Wrong())
    (*_, group) = (node for node in fast.graph_module.graph.nodes if "gtp_fx.group" in str(node.target))
    *args, text = group.args
    group.args = (*args, re.sub(r"wrong:\w+", "wrong:0123456789ab", text))
    fast.graph_module.recompile()
    with pytest.raises(
        gtp_fx.OptionError,
        match=r"made with 'wrong:0123456789ab', and registered here is wrong:\w{12}: register the same",
    ):
        fast.graph_module(images(CLIP))


@pytest.mark.nightly
def test_a_saved_map_is_told_from_another() -> None:
    @gtp_fx.strategies.register_saliency("upper")
    def upper(x_BCHW: Tensor) -> Tensor:
        return torch.arange(x_BCHW.shape[-2], 0, -1.0)[:, None].expand(x_BCHW.shape[0], *x_BCHW.shape[-2:])

    first = optimized(gtp_fx.strategies.Saliency(map="upper"), schedule=[40, 0, 0])
    (before,) = first.provenance(images(CLIP))

    @gtp_fx.strategies.register_saliency("upper")
    def lower(x_BCHW: Tensor) -> Tensor:
        return torch.arange(x_BCHW.shape[-2]).float()[:, None].expand(x_BCHW.shape[0], *x_BCHW.shape[-2:])

    second = optimized(gtp_fx.strategies.Saliency(map="upper"), schedule=[40, 0, 0])
    (after,) = second.provenance(images(CLIP))
    assert not torch.equal(before.index, after.index)
    assert torch.equal(first.provenance(images(CLIP))[0].index, before.index)
