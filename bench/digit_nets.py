"""Small vision transformers trained on `bench.tasks`, a few minutes of one core each, to measure accuracy with.

    python -m bench.digit_nets --net digits-cls --seed 0 --seed 1

A net first learns from close-ups, which are small canvases with growing clutter, and then from whole canvases. In a
plain net, a close-up takes the position embeddings of a random part of the grid; a windowed net has none. Training uses
one thread, so that a seed gives the same net whatever else runs. The net is kept in the user's cache, under a hash of
everything that determines it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench.digits import Look, Split
from bench.scenes import CELL
from bench.scenes import LOOK as SCENES
from bench.tasks import TASKS, outputs_of
from gtp_fx.options.progress import Progress, progress_bar
from gtp_fx.targets import cache

Net = VisionTransformer | SwinTransformer

_RECIPE = 1
"""Version of the training, part of the cache's key. Increase it when code here or in `bench.digits` changes a net."""


@dataclass(frozen=True)
class NetConfig:
    """A net and its training.

    look: appearance of the canvases.
    patch: side of a patch, in pixels.
    width: channels.
    depth: blocks.
    heads: attention heads (of the first stage, in a windowed net).
    class_token: whether the head reads a CLS token; otherwise it reads the mean of the patches.
    close_ups: training steps on close-ups.
    close_up: side of a close-up, in pixels.
    steps: training steps on whole canvases, after the close-ups.
    batch: images per step.
    rate: highest learning rate.
    task: a name in `bench.tasks.TASKS`.
    windows: side of the attention windows of a Swin-like net with three stages; 0 for a plain transformer.
    """

    look: Look = field(default_factory=Look)
    patch: int = 8
    width: int = 64
    depth: int = 8
    heads: int = 4
    class_token: bool = True
    close_ups: int = 400
    close_up: int = 32
    steps: int = 350
    batch: int = 64
    rate: float = 2e-3
    task: str = "digits"
    windows: int = 0

    @property
    def tokens(self) -> int:
        """Return the number of patches of a canvas."""
        return (self.look.side // self.patch) ** 2


def load_or_train(config: NetConfig, seed: int, progress: Progress | None = None) -> Net:
    """Return the net of a configuration and seed in eval mode, from the cache, or trained now and put there."""
    path = cache_folder() / f"{_key(config, seed)}.safetensors"
    return kept_or_trained(path, lambda: build(config), lambda: train(config, seed, progress))


def kept_or_trained(path: Path, build: Callable[[], Net], train: Callable[[], Net]) -> Net:
    """Return the net of a file in eval mode, or train it now and write the file.

    build: returns the net with any weights. train: returns it trained, in eval mode.
    """
    if path.exists():
        model = build()
        model.load_state_dict(load_file(path))
        return model.eval()
    model = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Write to another file and rename it, so that no other process reads half a net.
    unfinished = path.with_suffix(f".{os.getpid()}")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, unfinished)
    unfinished.replace(path)
    return model


def build(config: NetConfig) -> Net:
    """Return the net at initialisation, drawn from torch's global generator.

    timm's own initialisation (a standard deviation of 0.02 everywhere) makes every attention nearly uniform at this
    width, so that learning starts slowly.
    """
    if config.windows:
        return _windowed(config)
    task = TASKS[config.task]
    model = VisionTransformer(
        img_size=config.look.side,
        patch_size=config.patch,
        in_chans=1,
        num_classes=task.classes,
        global_pool="" if task.per_patch else "token" if config.class_token else "avg",
        class_token=config.class_token and not task.per_patch,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
    )
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "head":
            ends_branch = name.endswith(("proj", "fc2"))
            nn.init.normal_(layer.weight, std=(0.5 if ends_branch else 1.0) * layer.in_features**-0.5)
    assert model.pos_embed is not None
    with torch.no_grad():
        model.pos_embed[:, model.num_prefix_tokens :] = 0.3 * _waves(config.look.side // config.patch, config.width)
    return model


def _windowed(config: NetConfig) -> SwinTransformer:
    """Return a Swin transformer with three stages, at initialisation."""
    return SwinTransformer(
        img_size=config.look.side,
        patch_size=config.patch,
        in_chans=1,
        num_classes=TASKS[config.task].classes,
        embed_dim=config.width,
        depths=(2, config.depth - 4, 2),
        num_heads=(config.heads, 2 * config.heads, 4 * config.heads),
        window_size=config.windows,
    )


def train(config: NetConfig, seed: int, progress: Progress | None = None) -> Net:
    """Train a net from scratch and return it in eval mode."""
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, task = build(config).train(), TASKS[config.task]
        optimizer = torch.optim.AdamW(model.parameters(), config.rate, betas=(0.9, 0.98), weight_decay=0.05)
        total = config.close_ups + config.steps
        for step in range(total):
            for group in optimizer.param_groups:
                group["lr"] = config.rate * min(1, (step + 1) / 50, 2 * (1 - step / total))
            look = _look_at(config, step)
            images, labels = task.draw(Split.train, seed * 1_000_000 + step, config.batch, look, config.patch)
            loss = task.loss(_forward(model, config, images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if progress is not None:
                progress(f"training net {seed}, loss {loss.item():.2f}", step + 1, total)
    return model.eval()


def cache_folder() -> Path:
    """Return the folder of trained nets in gtp_fx's cache."""
    return cache.cache_folder() / "digit_nets"


def _key(config: NetConfig, seed: int) -> str:
    """Return the cache's key: a hash of configuration, seed and recipe."""
    described = asdict(config)
    for field_, default in (("task", "digits"), ("windows", 0)):
        if described[field_] == default:  # the fields are newer than some cached nets, whose keys should stay valid
            del described[field_]
    text = json.dumps({"config": described, "seed": seed, "recipe": _RECIPE}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _look_at(config: NetConfig, step: int) -> Look:
    """Return the look of a step's canvases. The first close-ups show only the digit; clutter grows from there."""
    if step >= config.close_ups:
        return config.look
    clutter = min(1.0, 2 * step / config.close_ups)
    share = clutter * (config.close_up / config.look.side) ** 2
    pieces, strokes = math.ceil(share * config.look.pieces), math.ceil(share * config.look.strokes)
    return replace(config.look, side=config.close_up, pieces=pieces, strokes=strokes, noise=clutter * config.look.noise)


def _forward(model: Net, config: NetConfig, images: Tensor) -> Tensor:
    """Return the logits of canvases or close-ups.

    In a plain net, close-ups take the position embeddings of a random part of the grid.
    """
    sides = images.shape[-1] // config.patch, config.look.side // config.patch
    if sides[0] == sides[1]:
        whole: Tensor = model(images)
        return whole
    if isinstance(model, SwinTransformer):
        model.set_input_size(img_size=images.shape[-1])
        found: Tensor = model(images)
        model.set_input_size(img_size=config.look.side)
        return found
    assert model.pos_embed is not None
    top, left = torch.randint(0, sides[1] - sides[0] + 1, (2,)).tolist()
    prefix, grid = model.pos_embed.split([model.num_prefix_tokens, sides[1] ** 2], dim=1)
    window = grid.unflatten(1, (sides[1], sides[1]))[:, top : top + sides[0], left : left + sides[0]].flatten(1, 2)
    x = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + window
    if config.class_token:
        x = torch.cat([(model.cls_token + prefix).expand(len(x), -1, -1), x], dim=1)
    return model.forward_head(model.norm(model.blocks(x)))


def _waves(side: int, width: int) -> Tensor:
    """Return sines and cosines of row and column as position embeddings [1, side², width]."""
    frequencies = 20.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    along = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(1, side * side, width)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread within the context.

    Sums are then in the same order on every machine, and parallel trainings don't compete for threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


NETS = {
    "digits-cls": NetConfig(),
    "digits-pooled": NetConfig(class_token=False),
    "digits-windowed": NetConfig(patch=4, width=32, depth=8, heads=2, windows=4, class_token=False),
    "scenes-cls": NetConfig(look=SCENES, task="scenes", close_ups=600, close_up=CELL, steps=1200),
    "patches": NetConfig(task="patches", class_token=False),
}
"""Nets of `bench.accuracy`: with and without a CLS token, windowed, with a harder task, and with dense output."""


def main(
    seed: Annotated[list[int], typer.Option(help="Seeds, each its own net.")],
    net: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(NETS)}; all where none is given.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw canvases of each net's task with labels to this PNG.")
    ] = None,
) -> None:
    """Train nets that aren't in the cache yet, and print each one's score on 2,000 canvases of unseen digits."""
    chosen = net or list(NETS)
    if unknown := [name for name in chosen if name not in NETS]:
        raise typer.BadParameter(f"{unknown[0]!r} is unknown; nets are {', '.join(NETS)}")
    if sheet is not None:
        from bench.sheet import draw_sheet  # imported here, because bench.sheet imports this module

        draw_sheet([NETS[name] for name in chosen], sheet)
    for name in chosen:
        config = NETS[name]
        task = TASKS[config.task]
        images, labels = task.draw(Split.test, 0, 2000, config.look, config.patch)
        for number in seed:
            with progress_bar() as show:
                model = load_or_train(config, number, show)
            score = task.score(outputs_of(model, images), labels)
            typer.echo(f"{name} {number}, {config.tokens} tokens: {100 * score:.1f} %")


if __name__ == "__main__":
    typer.run(main)
