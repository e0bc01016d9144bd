"""Small vision transformers over videos and windows, each frame or window with tokens of its own, and walks by hand.

Letters in tensor names: B images, F frames, N tokens of a frame or window (its own prefix tokens first), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from support.batches import PATCH, WIDTH, Block
from support.reference import select, token_scores
from support.reference_stream import CLEAR, Stream

FRAMES, GRID = 3, 4
APART = ("cls", "mean", "register", "over cls", "map", "over time at the end")
"""How a net reads the frames that its blocks keep apart."""


def heads_of(block: Block, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, H, N, D], of a block's norm and projection."""
    return block.qkv(block.norms[0](x_BNC)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Frames(nn.Module):
    """Blocks over each frame of a video [B, 3, F, H, W], alone; then whatever `read` says makes of them."""

    def __init__(self, read: str, by_views: bool = False) -> None:
        super().__init__()
        self.read, self.by_views = read, by_views
        self.prefix = 0 if read == "mean" else 2 if read == "register" else 1
        self.patches = nn.Conv3d(3, WIDTH, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.own = nn.Parameter(torch.randn(1, 1, self.prefix, WIDTH))
        self.place = nn.Parameter(torch.randn(1, FRAMES, GRID * GRID, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.across, self.head = Block(), nn.Linear(WIDTH, 5)

    def forward(self, video: Tensor) -> Tensor:
        x_BFNC = self.tokens(video)
        x = self.blocks(x_BFNC.flatten(0, 1))
        return self.after(x.unflatten(0, (-1, FRAMES)))

    def tokens(self, video: Tensor) -> Tensor:
        """[B, F, N, C]"""
        if self.by_views:
            x = video.unflatten(-2, (GRID, PATCH)).unflatten(-1, (GRID, PATCH)).permute(0, 2, 3, 5, 1, 4, 6)
            x = nn.functional.linear(x.flatten(4).flatten(2, 3), self.patches.weight.flatten(1), self.patches.bias)
        else:
            x = self.patches(video).flatten(3).permute(0, 2, 3, 1)
        return torch.cat([self.own.expand(x.shape[0], FRAMES, -1, -1), x + self.place], dim=2)

    def after(self, x_BFNC: Tensor) -> Tensor:
        if self.read == "map":
            return self.head(x_BFNC[:, :, 1:].unflatten(2, (GRID, GRID)))
        if self.read == "over time at the end":  # all frames of a place, its CLS as well
            x_BNFC = x_BFNC.transpose(1, 2)
            return self.head(self.across(x_BNFC.flatten(0, 1)).unflatten(0, (-1, x_BNFC.shape[1])).mean((1, 2)))
        x_BFC = x_BFNC.mean(2) if self.read in ("mean", "register") else x_BFNC[:, :, 0]
        return self.head((self.across(x_BFC) if self.read == "over cls" else x_BFC).mean(1))

    def by_hand(self, video: Tensor, schedule: Sequence[int]) -> Tensor:
        """What remains where tokens of each frame leave after its blocks; a frame is an image to `Stream`."""
        stream = Stream(self.tokens(video).flatten(0, 1), (GRID, GRID), self.prefix)
        for block, count in zip(self.blocks, schedule, strict=True):
            attended_BNC = stream.attend(*heads_of(block, stream.x_BNC))
            stream.x_BNC = stream.x_BNC + block.out(attended_BNC)
            stream.leave(count)
            stream.x_BNC = stream.x_BNC + block.mlp(block.norms[1](stream.x_BNC))
        x = stream.x_BNC
        if self.read in ("map", "over time at the end"):
            x = stream.recovered(x)
        return self.after(x.unflatten(0, (-1, FRAMES)))


def masked_branch(block: Block, x_BNC: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    """A block's stream after attention, and where its MLP counts: 0 for the `count` patches that it ranks lowest."""
    q, k, v = heads_of(block, x_BNC)
    map_BHNN = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    x_BNC = x_BNC + block.out((map_BHNN @ v).transpose(1, 2).flatten(2))
    _, skipped_BP, gap_B = select(token_scores(map_BHNN, prefix, "mixed-max"), count)
    assert (gap_B > CLEAR).all(), "this choice is a matter of rounding: take other weights or inputs"
    return x_BNC, torch.ones_like(x_BNC[..., :1]).scatter(1, prefix + skipped_BP[..., None], 0)


class Between(nn.Module):
    """Attention over each frame with its own CLS, then over the frames at each place, then an MLP, in every block."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = Frames("cls")
        self.time = nn.ModuleList(Block() for _ in range(3))

    def forward(self, video: Tensor, skipping: Sequence[int] = (0, 0, 0)) -> Tensor:
        """skipping: patches of each frame that skip a block's MLP, by hand."""
        x = self.frames.tokens(video)
        for space, time, count in zip(self.frames.blocks, self.time, skipping, strict=True):
            x = x.flatten(0, 1)
            counts = x.new_ones(())
            if count:
                x, counts = masked_branch(space, x, count, 1)
                counts = counts.unflatten(0, (-1, FRAMES)).transpose(1, 2).flatten(0, 1)
            else:
                x = x + space.out(nn.functional.scaled_dot_product_attention(*heads_of(space, x)).mT.flatten(1, 2).mT)
            x = x.unflatten(0, (-1, FRAMES)).transpose(1, 2).flatten(0, 1)
            x = x + time.out(nn.functional.scaled_dot_product_attention(*heads_of(time, x)).mT.flatten(1, 2).mT)
            added = space.mlp(space.norms[1](x))
            x = x + (added * counts if count else added)
            x = x.unflatten(0, (-1, 1 + GRID * GRID)).transpose(1, 2)
        return self.frames.after(x)


class Divided(nn.Module):
    """One CLS for the video and patches place by place, [B, 1 + N * F, C]: attention over time, over space, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.space, self.time = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, video: Tensor, skipping: Sequence[int] = (0, 0)) -> Tensor:
        """video: [B, F, 3, H, W]. skipping: patches of each frame that skip a block's MLP, by hand."""
        places, images = GRID * GRID, video.shape[0]
        x = self.patches(video.flatten(0, 1)).flatten(2).mT.unflatten(0, (-1, FRAMES))
        x = torch.cat([self.cls.expand(images, -1, -1), x.transpose(1, 2).flatten(1, 2)], 1)
        for space, time, count in zip(self.space, self.time, skipping, strict=True):
            over_time = x[:, 1:].reshape(-1, FRAMES, WIDTH)
            y = time.out(nn.functional.scaled_dot_product_attention(*heads_of(time, over_time)).mT.flatten(1, 2).mT)
            patches = x[:, 1:] + y.reshape(images, -1, WIDTH)
            frames = patches.unflatten(1, (places, FRAMES)).transpose(1, 2).reshape(-1, places, WIDTH)
            cls = x[:, :1].expand(-1, FRAMES, -1).reshape(-1, 1, WIDTH)
            frames = torch.cat([cls, frames], 1)
            if count:
                joined, counts = masked_branch(space, frames, count, 1)
                y = joined - frames
                counts = counts[:, 1:].unflatten(0, (images, FRAMES)).transpose(1, 2).flatten(1, 2)
                counts = torch.cat([torch.ones_like(counts[:, :1]), counts], 1)
            else:
                q, k, v = heads_of(space, frames)
                y = space.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
                counts = y.new_ones(())
            of_cls = y[:, :1].reshape(images, FRAMES, WIDTH).mean(1, keepdim=True)
            of_patches = y[:, 1:].unflatten(0, (-1, FRAMES)).transpose(1, 2).flatten(1, 2)
            x = torch.cat([x[:, :1], patches], 1) + torch.cat([of_cls, of_patches], 1)
            added = space.mlp(space.norms[1](x))
            x = x + (added * counts if count else added)
        return self.head(x[:, 0] + x[:, 1:].mean(1))


class Registers(nn.Module):
    """Windows of 2 x 2 over a picture's grid, then places far apart; registers are joined to each for one block."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.own = nn.Parameter(torch.randn(3, WIDTH))
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor, skipping: Sequence[int] = (0, 0)) -> Tensor:
        x = self.patches(image).permute(0, 2, 3, 1)
        for order, block, count in zip(((0, 1, 3, 2, 4, 5), (0, 2, 4, 1, 3, 5)), self.blocks, skipping, strict=True):
            x = x.unflatten(1, (GRID // 2, 2)).unflatten(3, (GRID // 2, 2)).permute(order)
            shape = x.shape
            x = x.reshape(-1, 4, WIDTH)
            x = torch.cat([self.own.expand(x.shape[0], -1, -1), x], 1)
            if count:
                x, counts = masked_branch(block, x, count, 3)
                x = x + block.mlp(block.norms[1](x)) * counts
            else:
                x = block(x)
            back = [order.index(dim) for dim in range(6)]
            x = x[:, 3:].reshape(shape).permute(back).reshape(-1, GRID, GRID, WIDTH)
        return self.head(x.mean((1, 2)))


@dataclass(frozen=True)
class Video:
    """A source of one of these nets, with the same weights as ever."""

    kind: str
    by_views: bool = False

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            own = {"between": Between, "divided": Divided, "windows": Registers}.get(self.kind)
            return (Frames(self.kind, self.by_views) if own is None else own()).eval().requires_grad_(False)

    def inputs(self, batch: int = 2) -> Tensor:
        side = GRID * PATCH
        layouts = {"windows": (3, side, side), "divided": (FRAMES, 3, side, side)}
        shape = (batch, *layouts.get(self.kind, (3, FRAMES, side, side)))
        return torch.randn(shape, generator=torch.Generator().manual_seed(batch))
