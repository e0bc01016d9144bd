"""Compiled code that torch keeps is that of these operators, and not of another version's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.compiler.config
from torch import Tensor

from gtp_fx.graph.torch_internals import cache_misses, fresh_compiler_cache
from gtp_fx.ops.code_tag import digest, tag_compiled_code


def test_the_users_tag_stays_and_the_digest_comes_once() -> None:
    assert torch.compiler.config.cache_key_tag.count("gtp_fx") == 1, "importing the operators has done it"
    with torch.compiler.config.patch(cache_key_tag="mine"):
        tag_compiled_code()
        tag_compiled_code()
        tag = torch.compiler.config.cache_key_tag
    assert tag.startswith("mine;gtp_fx ") and tag.count("gtp_fx") == 1


def test_other_code_or_another_name_has_another_digest(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x + 1")
    found = [digest([file])]
    file.write_text("x - 1")
    found += [digest([file]), digest([file.rename(tmp_path / "b.py")])]
    assert len(set(found)) == 3


@pytest.mark.nightly
def test_code_compiled_for_another_tag_is_not_taken() -> None:
    def run() -> int:
        torch._dynamo.reset()
        before = cache_misses()
        torch.compile(lambda scores: torch.ops.gtp_fx.select(scores, 2)[0])(scores)
        return cache_misses() - before

    scores: Tensor = torch.rand(2, 7)
    with torch.no_grad(), fresh_compiler_cache():
        assert run() > 0
        assert run() == 0, "it is taken from the cache, or this test says nothing"
        with torch.compiler.config.patch(cache_key_tag="another version"):
            assert run() > 0
