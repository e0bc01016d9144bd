"""The installed package: what a wheel holds, what importing costs, what works without the libraries of models."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.checkout import ROOT

pytestmark = pytest.mark.nightly


def run(code: str, *, cwd: Path | None = None) -> str:
    done = subprocess.run((sys.executable, "-c", code), cwd=cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: setuptools works in the folder that it packs, where two test processes would meet."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"))
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source))
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_a_wheel_has_all_of_the_package_and_nothing_beside_it(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    installed = {"gtp_fx/passes": ROOT / "passes", "gtp_fx/targets": ROOT / "targets", "gtp_fx": ROOT / "gtp_fx"}
    for inside, folder in installed.items():
        for file in folder.rglob("*.py"):
            assert f"{inside}/{file.relative_to(folder)}" in names
    assert {"gtp_fx/py.typed", "gtp_fx/cli/data/photo.jpg", "gtp_fx/cli/data/README.md"} <= names
    assert {name.partition("/")[0] for name in names} == {"gtp_fx", f"gtp_fx-{_version()}.dist-info"}


def test_its_metadata_name_the_command_the_backend_and_the_readme(wheel: zipfile.ZipFile) -> None:
    about = f"gtp_fx-{_version()}.dist-info"
    points = wheel.read(f"{about}/entry_points.txt").decode()
    assert "gtp-fx = gtp_fx.cli.app:main" in points and "gtp = gtp_fx.model.backend:gtp" in points
    metadata = wheel.read(f"{about}/METADATA").decode()
    assert "Description-Content-Type: text/markdown" in metadata and "Requires-Dist: torch>=2.11" in metadata


def test_importing_takes_less_than_a_second_beside_torchs_own() -> None:
    """The best of three; processor time, since other processes may be running."""
    code = "import torch, time; start = time.process_time(); import gtp_fx; print(time.process_time() - start)"
    assert min(float(run(code)) for _ in range(3)) < 1.0


def test_importing_brings_no_library_of_models_and_no_compiler() -> None:
    modules = ("timm", "transformers", "matplotlib", "onnx", "torch._inductor.compile_fx")
    code = f"import gtp_fx, gtp_fx.cli.app, sys; print([m for m in {modules} if m in sys.modules])"
    assert run(code).strip() == "[]"


WITHOUT = "import sys\nfor name in ('timm', 'transformers', 'matplotlib', 'onnxscript'): sys.modules[name] = None\n"


def test_a_model_of_ones_own_needs_neither_timm_nor_transformers(tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text((ROOT / "examples" / "own_model.py").read_text())
    assert "any batch" in run(f"{WITHOUT}import own_model; own_model.main()", cwd=tmp_path)


def test_a_cpu_needs_neither_triton_nor_cudas_libraries(tmp_path: Path) -> None:
    """As torch's build for CPUs comes: without both. A GPU's schedule is planned there all the same."""
    (tmp_path / "own_model.py").write_text((ROOT / "examples" / "own_model.py").read_text())
    without = "import sys\nfor name in ('triton', 'nvidia'): sys.modules[name] = None\n"
    assert "any batch" in run(f"{without}import own_model; own_model.main()", cwd=tmp_path)
    arguments = ["plan", "test_vit", "--flops-budget", "0.7", "--target", "h100"]
    code = f"{without}import gtp_fx.cli.app\ntry: gtp_fx.cli.app.main({arguments!r})\nexcept SystemExit as end: pass"
    assert "left as it was" in run(code, cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan", "deit_small_patch16_224", "--flops-budget", "0.7"], "pip install timm"),
        (["plan", "ViTForImageClassification", "--flops-budget", "0.7"], "pip install transformers"),
        (["plan", "own_model:MyViT", "--flops-budget", "0.7"], "example_inputs"),
    ],
)
def test_what_needs_one_says_so(arguments: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text((ROOT / "examples" / "own_model.py").read_text())
    code = (
        f"{WITHOUT}import gtp_fx.cli.app\n"
        f"try: gtp_fx.cli.app.main({arguments!r})\nexcept SystemExit as end: assert end.code == 2"
    )
    done = subprocess.run((sys.executable, "-c", code), cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stderr.startswith("gtp-fx: ") and told in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def _version() -> str:
    return run("import gtp_fx; print(gtp_fx.__version__)").strip()
