"""Every code block that a reader may copy: Python is run, file by file, and commands are parsed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from gtp_fx.cli import app as cli

from support.checkout import ROOT
from support.programs import run_program

pytestmark = pytest.mark.nightly

FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

SMALLER = {
    '"deit_small_patch16_224", pretrained=True': '"test_vit", depth=3',
    "3, 224, 224": "3, 160, 160",
    "from torch._dynamo.utils import counters": (
        "from torch._dynamo.utils import counters\n"
        "compile = torch.compile\n"
        "torch.compile = lambda function, **_: compile(function, backend='eager')"
    ),
}
"""Nothing is downloaded here, and small models say as much of the code as large ones. Code that counts compilations
counts as many without Inductor."""


def blocks(file: Path, kind: str) -> list[str]:
    return [text for language, text in BLOCK.findall(file.read_text()) if language == kind]


@pytest.mark.parametrize("file", [file for file in FILES if blocks(file, "python")], ids=lambda file: file.name)
def test_python_runs(file: Path, tmp_path: Path) -> None:
    """In a process of its own: what a reader registers stays the reader's."""
    code = "\n\n".join(blocks(file, "python"))
    for whole, less in SMALLER.items():
        code = code.replace(whole, less)
    (tmp_path / "blocks.py").write_text(code)  # a file: strategies are known by their source
    run_program(tmp_path / "blocks.py", cwd=tmp_path)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_are_ones_that_exist(file: Path) -> None:
    group = typer.main.get_command(cli.app)
    text = "\n".join(block for kind in ("console", "") for block in blocks(file, kind))
    inline = re.findall(r"`(gtp-fx [^`]+)`", file.read_text())
    for line in [*text.splitlines(), *inline]:
        command = line.rpartition("&& ")[2].strip()
        if not command.startswith("gtp-fx "):
            continue
        arguments = shlex.split(command)[1:]
        context = group.make_context("gtp-fx", list(arguments), resilient_parsing=True)
        if arguments[0].startswith("--") or "--help" in arguments:
            continue
        name, subcommand, rest = group.resolve_command(context, arguments)  # type: ignore[attr-defined]
        if rest and rest != ["MODEL"]:
            subcommand.make_context(name, [part.replace("MODEL", "test_vit") for part in rest])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text()):
        if not target.startswith("http"):
            assert (file.parent / target).exists(), f"{file.name}: {target}"
