"""Small vision transformers trained on photographs (CIFAR-10), an hour of one core each, to measure accuracy with.

    python -m bench.photograph_nets --data cifar10.tar.xz --seed 0

Each begins with a few convolutions, without which a transformer learns little from 50,000 photographs in so short a
time. Nets of one seed share a beginning where `NetConfig.start` says so: the one with 144 tokens and the pooled one go
on from the weights of the one with 64 tokens and a CLS token. Training uses one thread, so that a seed gives the same
net whatever else runs. After each epoch its state is kept, and a training that was stopped goes on from there. Nets
are kept in the user's cache, under a hash of everything that determines them. Those that results here are of are kept
in half precision in `bench/results/nets`, and read from there; the photographs aren't part of this repository.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from bench.digit_nets import Net, kept_or_trained, one_thread
from bench.photographs import load_photographs
from bench.tasks import TASKS, outputs_of
from gtp_fx.options.progress import Progress, progress_bar
from gtp_fx.targets import cache

CLASSES = 10
KEPT = Path(__file__).parent / "results" / "nets"
"""Weights that are part of this repository, a megabyte a net."""
_RECIPE = 1
"""Version of the training, part of the cache's key. Increase it when code here changes a net."""


@dataclass(frozen=True)
class NetConfig:
    """A net and its training.

    side: of the images in pixels; photographs of 32 are enlarged to it.
    patch: side of a patch in pixels: the stride of the convolutions in front.
    width: channels (of the first stage, in a windowed net).
    depth: blocks.
    heads: attention heads (of the first stage, in a windowed net).
    class_token: whether the head reads a CLS token; otherwise it reads the mean of the patches.
    windows: side of the attention windows of a Swin-like net with three stages; 0 for a plain transformer.
    start: net of the same seed whose weights this one begins with; "" for a fresh beginning.
    epochs: passes over the training photographs.
    batch: images per step.
    rate: highest learning rate.
    """

    side: int = 32
    patch: int = 4
    width: int = 96
    depth: int = 6
    heads: int = 3
    class_token: bool = True
    windows: int = 0
    start: str = ""
    epochs: int = 12
    batch: int = 128
    rate: float = 1.5e-3

    @property
    def tokens(self) -> int:
        """Return the number of patches of an image."""
        return (self.side // self.patch) ** 2


PHOTOGRAPH_NETS = {
    "photographs-cls": NetConfig(),
    "photographs-pooled": NetConfig(class_token=False, start="photographs-cls", epochs=3, rate=7e-4),
    "photographs-144": NetConfig(side=48, start="photographs-cls", epochs=2, rate=7e-4),
    "photographs-windowed": NetConfig(patch=2, width=48, depth=8, class_token=False, windows=4),
}
"""Nets of `bench.accuracy` that need photographs: CLS and pooled, 64 and 144 tokens, and windows."""


class Stem(nn.Module):
    """Convolutions as the patch embedding of a Swin transformer: [B, 3, H, W] -> [B, H / 2, W / 2, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolutions = ConvStem(
            depth=4, channels=(width // 2, width, width, width), stride=(1, 2, 1, 1), norm_layer=nn.BatchNorm2d
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.convolutions(images)
        return features.permute(0, 2, 3, 1)


def build(config: NetConfig) -> Net:
    """Return the net at initialisation, drawn from torch's global generator."""
    if config.windows:
        return _windowed(config)
    width = config.width
    stem = ConvStem(
        depth=4, channels=(width // 3, 2 * width // 3, width, width), stride=(1, 2, 2, 1), norm_layer=nn.BatchNorm2d
    )
    model = VisionTransformer(
        img_size=config.side,
        patch_size=1,
        num_classes=CLASSES,
        global_pool="token" if config.class_token else "avg",
        class_token=config.class_token,
        embed_dim=width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=2,
        embed_layer=lambda **sizes: HybridEmbed(stem, proj=False, **sizes),
    )
    _by_width(model.blocks)
    return model


def _by_width(blocks: nn.Module) -> None:
    """Draw the weights of linear layers anew by their width: timm's deviation of 0.02 learns slowly at these."""
    for name, layer in blocks.named_modules():
        if isinstance(layer, nn.Linear):
            ends_branch = name.endswith(("proj", "fc2"))
            nn.init.normal_(layer.weight, std=(0.5 if ends_branch else 1.0) * layer.in_features**-0.5)


def _windowed(config: NetConfig) -> SwinTransformer:
    """Return a Swin transformer with three stages, at initialisation."""
    model = SwinTransformer(
        img_size=config.side,
        patch_size=config.patch,
        num_classes=CLASSES,
        embed_dim=config.width,
        depths=(2, config.depth - 4, 2),
        num_heads=(config.heads, 2 * config.heads, 4 * config.heads),
        window_size=config.windows,
        mlp_ratio=3,
        drop_path_rate=0.0,
    )
    model.patch_embed = Stem(config.width)  # type: ignore[assignment]
    _by_width(model.layers)
    return model


def resized(images: Tensor, config: NetConfig) -> Tensor:
    """Photographs [B, 3, 32, 32] at the side that a net takes."""
    if images.shape[-1] == config.side:
        return images
    return F.interpolate(images, size=config.side, mode="bilinear", align_corners=False)


def load_or_train(name: str, seed: int, data: Path | None, progress: Progress | None = None) -> Net:
    """Return a net of `PHOTOGRAPH_NETS` in eval mode, from `KEPT`, from the cache, or trained now and put there.

    data: photographs (`bench.photographs.load_photographs`), needed where the net is in neither of them.
    Raises FileNotFoundError where it isn't and `data` is None.
    """
    config, path = PHOTOGRAPH_NETS[name], _path(name, seed)
    if kept_path(name, seed).exists():
        model = build(config)
        model.load_state_dict(load_file(kept_path(name, seed)))  # copies halves into what the net computes in
        return model.eval()
    unfinished = path.with_suffix(".unfinished")

    def trained() -> Net:
        if data is None:
            raise FileNotFoundError(f"{name} of seed {seed} isn't in {path.parent}, and no photographs are given")
        start = load_or_train(config.start, seed, data, progress).state_dict() if config.start else None
        return train(config, seed, *load_photographs(data, "train", 5000), start, unfinished, progress)

    model = kept_or_trained(path, lambda: build(config), trained)
    unfinished.unlink(missing_ok=True)
    return model


def train(
    config: NetConfig,
    seed: int,
    images: Tensor,
    labels: Tensor,
    start: Mapping[str, Tensor] | None = None,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Net:
    """Train a net and return it in eval mode.

    images, labels: normalised [N, 3, 32, 32] and [N]. start: another net's weights. state: a file for what a training
    that was stopped goes on from.
    """
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config).train().to(memory_format=torch.channels_last)  # a tenth faster on a CPU
        if start is not None:
            begin_with(model, start)
        optimizer = torch.optim.AdamW(model.parameters(), config.rate, betas=(0.9, 0.98), weight_decay=0.05)
        steps = len(images) // config.batch
        plan = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.rate, total_steps=config.epochs * steps, pct_start=0.15, cycle_momentum=False
        )
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "plan": plan}
        for epoch in range(_restored(state, parts), config.epochs):
            torch.manual_seed(1000 * seed + epoch)  # an epoch's photographs don't depend on where training was stopped
            order = torch.randperm(len(images))
            for step, chosen in enumerate(order[: steps * config.batch].split(config.batch)):
                outputs = model(resized(_altered(images[chosen]), config))
                loss = F.cross_entropy(outputs, labels[chosen], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                plan.step()
                if progress is not None:
                    progress(f"seed {seed}, loss {loss.item():.2f}", epoch * steps + step + 1, config.epochs * steps)
            if state is not None:
                _keep(state, parts, epoch + 1)
    return model.eval()


def begin_with(model: Net, start: Mapping[str, Tensor]) -> None:
    """Take another net's weights, position embeddings at the size and with the prefix tokens of this one."""
    own = model.state_dict()
    taken = {name: value for name, value in start.items() if name in own and own[name].shape == value.shape}
    if isinstance(model, VisionTransformer) and model.pos_embed is not None and "pos_embed" not in taken:
        here, theirs = model.num_prefix_tokens, int("cls_token" in start)
        prefix, grid = start["pos_embed"].split([theirs, start["pos_embed"].shape[1] - theirs], dim=1)
        side = round((model.pos_embed.shape[1] - here) ** 0.5)
        grid = resample_abs_pos_embed(grid, (side, side), num_prefix_tokens=0)
        taken["pos_embed"] = torch.cat([prefix[:, :here], grid], dim=1)
    # The pooled net normalises after pooling, under another name; what has no counterpart begins anew.
    model.load_state_dict(taken, strict=False)


def _altered(images: Tensor) -> Tensor:
    """Photographs flipped by chance and moved by up to four pixels, from torch's global generator."""
    n, _, height, width = images.shape
    images = torch.where((torch.rand(n) < 0.5)[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect")
    rows = torch.randint(0, 9, (n, 1)) + torch.arange(height)
    columns = torch.randint(0, 9, (n, 1)) + torch.arange(width)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _keep(state: Path, parts: Mapping[str, Any], epochs: int) -> None:
    """Write what training goes on from after `epochs` epochs."""
    state.parent.mkdir(parents=True, exist_ok=True)
    part = state.with_suffix(f".{os.getpid()}")
    torch.save({"epochs": epochs} | {name: value.state_dict() for name, value in parts.items()}, part)
    part.replace(state)


def _restored(state: Path | None, parts: Mapping[str, Any]) -> int:
    """Return the number of epochs that are done already, and bring the parts to where these ended."""
    if state is None or not state.exists():
        return 0
    kept = torch.load(state, weights_only=True)
    for name, value in parts.items():
        value.load_state_dict(kept[name])
    return int(kept["epochs"])


def keep(name: str, seed: int, model: Net) -> None:
    """Write a net's weights to `KEPT`, in half precision."""
    KEPT.mkdir(parents=True, exist_ok=True)
    weights = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_file({key: value.contiguous() for key, value in weights.items()}, kept_path(name, seed))


def kept_path(name: str, seed: int) -> Path:
    """Return where `keep` writes a net: another recipe has another name, so that no net passes for another."""
    return KEPT / f"{name}_{seed}_{_key(name, seed)[:8]}.safetensors"


def _path(name: str, seed: int) -> Path:
    """Return the net's file in the cache."""
    return cache.cache_folder() / "photograph_nets" / f"{_key(name, seed)}.safetensors"


def _key(name: str, seed: int) -> str:
    """Return a hash of a net's and its beginning's configuration."""
    described = [asdict(PHOTOGRAPH_NETS[name])]
    while described[-1]["start"]:
        described.append(asdict(PHOTOGRAPH_NETS[described[-1]["start"]]))
    text = json.dumps({"nets": described, "seed": seed, "recipe": _RECIPE}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def main(
    data: Annotated[Path, typer.Option(help="CIFAR-10 as JPEGs, a folder or a tar.")],
    seed: Annotated[list[int], typer.Option(help="Seeds, each its own nets.")],
    net: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PHOTOGRAPH_NETS)}; all.")] = None,
    keeps: Annotated[bool, typer.Option("--keep", help="Write them to bench/results/nets, in half precision.")] = False,
) -> None:
    """Train nets that aren't there yet, and print each one's accuracy on the 10,000 test photographs."""
    chosen = net or list(PHOTOGRAPH_NETS)
    if unknown := [name for name in chosen if name not in PHOTOGRAPH_NETS]:
        raise typer.BadParameter(f"{unknown[0]!r} is unknown; nets are {', '.join(PHOTOGRAPH_NETS)}")
    images, labels = load_photographs(data, "test", 1000)
    for name in chosen:
        config = PHOTOGRAPH_NETS[name]
        for number in seed:
            with progress_bar() as show:
                model = load_or_train(name, number, data, show)
            if keeps and not kept_path(name, number).exists():
                keep(name, number, model)
                model = load_or_train(name, number, data)  # what is kept is what is scored
            score = TASKS["digits"].score(outputs_of(model, resized(images, config)), labels)
            typer.echo(f"{name} {number}, {config.tokens} tokens: {100 * score:.1f} %")


if __name__ == "__main__":
    typer.run(main)
