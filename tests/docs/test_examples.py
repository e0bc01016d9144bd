"""Every example, run as its docstring says, on small models that are made here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from bench.live_weights import enliven
from gtp_fx.cli.photo import load_photo

from support.checkout import ROOT
from support.programs import run_program

pytestmark = pytest.mark.nightly

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}


def run_example(name: str, *arguments: str) -> str:
    return run_program(ROOT / "examples" / name, *arguments, cwd=ROOT)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("pictures") / "photo.png"
    load_photo().save(file)
    return str(file)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory as a CLIP checkpoint has it: configuration, weights, tokenizer of single letters, image processor."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(number) for number in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    side = {"height": 64, "width": 64}
    images = transformers.CLIPImageProcessor(size=side, crop_size=side)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    text = {**SMALL, "vocab_size": len(words), "eos_token_id": len(words) - 1, "bos_token_id": len(words) - 2}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**SMALL, "image_size": 64, "patch_size": 8}, projection_dim=32
    )
    enliven(transformers.CLIPModel(config)).save_pretrained(folder)
    return str(folder)


def test_classify(photo: str) -> None:
    told = run_example("classify.py", photo, "--model", "test_vit", "--flops-budget", "0.9")
    assert "of its FLOPs" in told and "photo.png: class" in told


def test_clip_zero_shot(photo: str, clip: str) -> None:
    told = run_example("clip_zero_shot.py", photo, "--labels", "a cat", "--labels", "a dog", "--model", clip)
    assert "a cat:" in told and "of the image tower's FLOPs" in told


def test_dense_features(photo: str, tmp_path: Path) -> None:
    out = tmp_path / "features.png"
    told = run_example("dense_features.py", photo, "--model", "test_vit", "--out", str(out))
    assert "cosine of each patch's features" in told
    assert Image.open(out).size == (1024, 552)


def test_vlm_tower() -> None:
    told = run_example("vlm_tower.py", "--new-tokens", "4")
    kept = int(told.split("; ")[1].split(" of ")[0])
    assert "weights: random" in told and "patches kept, by row and column: [(" in told
    assert 16 < kept < 256 and f"prefill: 276 tokens before, {20 + kept} after" in told


def test_own_model() -> None:
    told = run_example("own_model.py")
    assert "logits [5, 10]: any batch" in told and "can't be reached: the lowest ratio" in told


def test_embed_folder_with_torchrun(tmp_path: Path) -> None:
    pictures, out = tmp_path / "pictures" / "deeper", tmp_path / "out"
    pictures.mkdir(parents=True)
    for number in range(5):
        load_photo().rotate(30 * number).save(pictures / f"{number}.png")
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/embed_folder.py")
    options = (str(pictures.parent), str(out), "--model", "test_vit", "--batch", "2", "--workers", "0", "--eager")
    done = subprocess.run((sys.executable, *command, *options), capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "weights: random" in done.stdout
    parts = [load_file(out / f"part_{rank:04d}.safetensors")["embeddings"] for rank in range(2)]
    assert [list(part.shape) for part in parts] == [[3, 64], [2, 64]]
    assert (out / "part_0001.txt").read_text() == "deeper/1.png\ndeeper/3.png\n"
    assert all(bool(part.isfinite().all()) for part in parts) and not torch.equal(parts[0][0], parts[1][0])
    assert "is there" in run_example("embed_folder.py", *options)
