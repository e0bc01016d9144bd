"""A vision-language model whose language model reads fewer image tokens.

    python examples/vlm_tower.py
    python examples/vlm_tower.py photo.jpg --model llava-hf/llava-1.5-7b-hf --flops-budget 0.5

The vision tower removes tokens and doesn't put them back, and the prompt has as many image tokens fewer, so prefill is
shorter, too. Without --model it is a small LLaVA of random weights, which says nothing but shows how it is done.
Models of transformers work whose projector takes tokens one by one (LLaVA, PaliGemma); others are refused by name.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from PIL import Image
from torch import nn

import gtp_fx

SIDE, PATCH, IMAGE_TOKEN = 224, 14, 90


def small_llava() -> tuple[nn.Module, dict[str, Any]]:
    """Return LLaVA with a CLIP tower of six blocks, and a prompt of one image as its processor would make it."""
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            **wide,
            "num_hidden_layers": 6,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        text_config={"model_type": "llama", **wide, "num_hidden_layers": 6, "vocab_size": 100, "eos_token_id": None},
        image_token_index=IMAGE_TOKEN,
    )
    text = torch.randint(3, 80, (1, 20))
    ids = torch.cat([text[:, :4], torch.full((1, (SIDE // PATCH) ** 2), IMAGE_TOKEN), text[:, 4:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, SIDE, SIDE)}
    return transformers.AutoModelForImageTextToText.from_config(config).eval(), inputs


def checkpoint(name: str, picture: Path, question: str) -> tuple[nn.Module, dict[str, Any], Callable[[Any], list[str]]]:
    """Return a checkpoint, a prompt about a picture, and what turns ids into text."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(name).eval()
    processor = transformers.AutoProcessor.from_pretrained(name)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = processor(images=Image.open(picture).convert("RGB"), text=text, return_tensors="pt")
    return model, dict(inputs), lambda ids: processor.batch_decode(ids, skip_special_tokens=True)


def seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """Return the processor time of one run, the median of several after the first."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


@torch.no_grad()
def main(
    picture: Annotated[Path | None, typer.Argument(help="A JPEG or PNG; with --model.")] = None,
    model: Annotated[str | None, typer.Option(help="Name or directory of a vision-language model.")] = None,
    tower: Annotated[str, typer.Option(help="Path of its vision tower.")] = "model.vision_tower",
    question: Annotated[str, typer.Option(help="What to ask about the picture.")] = "What is in the picture?",
    flops_budget: Annotated[float, typer.Option(help="Of the tower's FLOPs.")] = 0.5,
    new_tokens: Annotated[int, typer.Option(help="To generate.")] = 20,
) -> None:
    decode = None
    if model is None:
        print("weights: random")
        vlm, inputs = small_llava()
    elif picture is None:
        raise typer.BadParameter("--model needs a picture")
    else:
        vlm, inputs, decode = checkpoint(model, picture, question)
    images = gtp_fx.fewer_image_tokens(vlm, inputs, tower=tower, flops_budget=flops_budget, compile=False)
    before = seconds(lambda: vlm(**inputs))
    vlm.set_submodule(images.path, images.tower)
    fewer = images.prompt(inputs)
    after = seconds(lambda: vlm(**fewer))
    print(f"{images.tower.report.flops_ratio:.3f} of the tower's FLOPs; {images.after} of {images.before} image tokens")
    print(f"prefill: {inputs['input_ids'].shape[1]} tokens before, {fewer['input_ids'].shape[1]} after")
    print(f"tower and prefill, eager: {1e3 * before:.1f} ms of processor time before, {1e3 * after:.1f} after")
    kept = images.kept_tokens(inputs["pixel_values"])
    if kept is not None:
        places = [divmod(int(place), kept.grid[1]) for place in kept.positions[0, :4]]
        print(f"patches kept, by row and column: {places} …")
    ids = vlm.generate(**fewer, max_new_tokens=new_tokens, do_sample=False)
    new = ids[:, fewer["input_ids"].shape[1] :]
    print(f"generated: {decode(new)[0] if decode else new[0].tolist()}")


if __name__ == "__main__":
    typer.run(main)
