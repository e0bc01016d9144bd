"""The rooms of the house: imports run down from floor to floor, and make no circle."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gtp_fx
from gtp_fx.options.schedule import AUTO, SCHEDULES
from gtp_fx.passes.order import as_table
from gtp_fx.plan.uniform import SCHEDULE_FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"gtp_fx": "gtp_fx", "passes": "gtp_fx.passes", "targets": "gtp_fx.targets"}
"""Folders at the top of the checkout, and what they are imported as."""

FLOORS = (
    "errors",
    "ops",
    "graph",
    "targets",
    "kernels",
    "types",
    "strategies",
    "capture",
    "analysis",
    "options",
    "plan",
    "passes",
    "report",
    "model",
    "measure",
    "__init__",
    "cli",
)
"""Of gtp_fx, from the ground up. A room imports from those below it."""
MOST_ENTRIES = 16
"""At the package's root, files and folders."""


@dataclass(frozen=True)
class Import:
    """importer, imported: modules by their dotted names. where: file and line."""

    importer: str
    imported: str
    where: str


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for folder, package in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = [part for part in file.relative_to(ROOT / folder).with_suffix("").parts if part != "__init__"]
            found[".".join([package, *parts])] = file
    return found


def imports() -> Iterator[Import]:
    """All of them: at the top of a file, inside functions, and for annotations alone."""
    known = modules()
    for module, file in known.items():
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in known else node.module for name in whole]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name in known and name != module:
                    yield Import(module, name, f"{file.relative_to(ROOT)}:{node.lineno}")  # type: ignore[attr-defined]


def room(module: str) -> str:
    """The folder under gtp_fx that a module lies in, or the module itself where it lies in none."""
    return module.split(".")[1] if "." in module else "__init__"


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The first circle found, from a name back to itself; empty where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for following in sorted(arrows.get(name, ())):
            if found := walk(following, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_every_import_runs_down() -> None:
    level = {name: floor for floor, name in enumerate(FLOORS)}
    up = [
        f"{found.where}: {found.importer} imports {found.imported}, which lies above it"
        for found in imports()
        if level[room(found.importer)] < level[room(found.imported)]
    ]
    assert not up, "\n".join(up)


def test_every_room_is_on_a_floor() -> None:
    assert {room(module) for module in modules()} == set(FLOORS)


def test_imports_make_no_circle_of_files() -> None:
    """Of folders none can, where every import runs down."""
    arrows: dict[str, set[str]] = {}
    lines: dict[tuple[str, str], str] = {}
    for found in imports():
        arrows.setdefault(found.importer, set()).add(found.imported)
        lines[found.importer, found.imported] = found.where
    around = circle(arrows)
    assert not around, "\n".join(f"{lines[pair]}: imports {pair[1]}" for pair in itertools.pairwise(around))


def test_names_imported_later_are_those_that_type_checkers_see() -> None:
    """PEP 562: `gtp_fx.optimize` imports its module at the first look, and these imports are never run."""
    seen: dict[str, tuple[str, ...]] = {}
    for node in ast.parse((ROOT / "gtp_fx" / "__init__.py").read_text()).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for entry in node.body:
                if isinstance(entry, ast.ImportFrom) and entry.module:
                    seen[entry.module] = tuple(sorted(alias.name for alias in entry.names))
    assert seen == {module: tuple(sorted(names)) for module, names in gtp_fx._LATER.items()}
    assert set(itertools.chain(*seen.values())) <= set(gtp_fx.__all__)


def test_no_module_looks_at_the_package_itself_as_it_is_imported() -> None:
    """`from gtp_fx import …` would import everything, in the midst of an import of a part."""
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for module, file in modules().items()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "gtp_fx"
    ]
    assert not found


def test_schedules_by_rule_are_those_that_options_name() -> None:
    assert {*SCHEDULES} == {AUTO, *SCHEDULE_FAMILIES}


def test_private_names_of_torch_are_in_one_folder() -> None:
    shared = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_pytree"}
    found = []
    for file in modules().values():
        if file.parent.name == "torch_internals":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            dotted = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if isinstance(node, ast.Attribute):
                dotted = ast.unparse(node)
            private = [part for part in dotted.split(".")[1:] if part.startswith("_") and not part.startswith("__")]
            if dotted.startswith("torch.") and {*private} - shared:
                found.append(f"{file.relative_to(ROOT)}: {dotted}")
    assert not found, "\n".join(found)


def test_the_map_shows_the_passes_as_they_are() -> None:
    assert as_table() in (ROOT / "ARCHITECTURE.md").read_text(), "print gtp_fx.passes.order.as_table() and put it in"


def test_few_entries_at_the_root() -> None:
    entries = {path.name for path in (ROOT / "gtp_fx").iterdir() if path.name != "__pycache__"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
