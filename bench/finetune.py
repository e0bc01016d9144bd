"""Benchmark: accuracy recovered by a few minutes of self-distillation through the optimised graph, without labels.

    python -m bench.finetune --net digits-cls --flops-budget 0.3 --out bench/results/finetune_digits.json
    torchrun --nproc-per-node 2 -m bench.finetune --net patches --flops-budget 0.3

The original is the teacher. The student is the optimised model over a copy of its parameters. The student's outputs
learn from the teacher's by Kullback-Leibler divergence. In nets with an output per patch, each kept token also learns
from all patches it represents, according to its provenance. Under torchrun, the processes' gradients are averaged
(DistributedDataParallel).
"""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gtp_fx
from bench.digit_nets import NETS, NetConfig, load_or_train
from bench.digits import Split
from bench.environment import Environment
from bench.output import publish
from bench.tasks import TASKS, outputs_of
from gtp_fx.options.options import DEFAULTS
from gtp_fx.options.progress import Progress, progress_bar

_SEEDS = 900_000_000
"""First seed of the canvases, beyond those that the nets were trained on."""


@dataclass(frozen=True)
class Training:
    """Settings of the distillation.

    steps: training steps.
    batch: canvases per step and process.
    rate: highest learning rate.
    temperature: temperature of both distributions.
    tokens: weight of `token_loss`, for nets with an output per patch.
    """

    steps: int = 300
    batch: int = 64
    rate: float = 2e-4
    temperature: float = 2.0
    tokens: float = 0.3


@dataclass(frozen=True)
class Result:
    """Result for one net. Scores are in [0, 1], on unseen digits.

    net: a name in `NETS`.
    seed: seed of the net's training.
    flops_ratio: FLOPs of the optimised model / the original's.
    original: the original's score.
    off_the_shelf: the optimised model's score before training.
    trained: the optimised model's score after training.
    first_loss: mean loss of the first tenth of the steps.
    last_loss: mean loss of the last tenth.
    """

    net: str
    seed: int
    flops_ratio: float
    original: float
    off_the_shelf: float
    trained: float
    first_loss: float
    last_loss: float


def main(
    net: Annotated[str, typer.Option(help=f"Of {', '.join(NETS)}.")] = "digits-cls",
    seed: Annotated[list[int] | None, typer.Option(help="Nets; 0 where none is given.")] = None,
    flops_budget: Annotated[float, typer.Option()] = 0.3,
    strategy: Annotated[str, typer.Option()] = DEFAULTS["strategy"],
    steps: Annotated[int, typer.Option(min=10)] = Training().steps,
    test_images: Annotated[int, typer.Option()] = 1000,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Train optimised nets to reproduce the originals' outputs."""
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if distributed:
        dist.init_process_group("gloo")
    try:
        training, config = Training(steps=steps), NETS[net]
        results = []
        for number in seed or [0]:
            with progress_bar(_rank() == 0) as show:
                teacher = load_or_train(config, number, show)
                student = optimised(teacher, config, flops_budget, strategy)
                before = scored(student, config, test_images)
                losses = distil(student, teacher, config, training, show)
            tenth = max(1, steps // 10)
            first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
            scores = (scored(teacher, config, test_images), before, scored(student, config, test_images))
            results.append(Result(net, number, student.report.flops_ratio, *scores, first, last))
        if _rank() == 0:
            _publish(results, training, strategy, out)
    finally:
        if distributed:
            dist.destroy_process_group()


def optimised(teacher: nn.Module, config: NetConfig, flops_budget: float, strategy: str) -> gtp_fx.OptimizedModel:
    """Return the optimised model over a copy of the teacher's parameters. It runs eagerly, since the nets are small."""
    example = torch.zeros(2, 1, config.look.side, config.look.side)
    options: dict[str, Any] = {"flops_budget": flops_budget, "strategy": strategy}
    return gtp_fx.optimize(copy.deepcopy(teacher), **options, example_inputs=example, compile=False)


def distil(
    student: gtp_fx.OptimizedModel,
    teacher: nn.Module,
    config: NetConfig,
    training: Training,
    progress: Progress | None = None,
) -> list[float]:
    """Train `student` in place and leave it in eval mode. Return the loss of every step, on this process's canvases."""
    task, count = TASKS[config.task], _world()
    student.train()
    wrapped: nn.Module = DistributedDataParallel(student) if count > 1 else student
    optimizer = torch.optim.AdamW(student.parameters(), training.rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate * min(1.0, (step + 1) / 10, 1.5 * (1 - step / training.steps))
        drawn = _SEEDS + step * count + _rank()
        images, _ = task.draw(Split.train, drawn, training.batch, config.look, config.patch)
        with torch.no_grad():
            wanted = teacher(images)
        found = wrapped(images)
        if task.per_patch:
            loss = divergence_loss(found.flatten(0, 1), wanted.flatten(0, 1), training.temperature)
            if training.tokens:
                (provenance,) = student.provenance(images)
                matrix, index = provenance.matrix.detach(), provenance.index
                loss = loss + training.tokens * token_loss(found, wanted, matrix, index, training.temperature)
        else:
            loss = divergence_loss(found, wanted, training.temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if progress is not None:
            progress(f"distilling, loss {losses[-1]:.3g}", step + 1, training.steps)
    student.eval()
    return losses


def divergence_loss(found_BV: Tensor, wanted_BV: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher, student), mean over rows, times temperature squared."""
    log_found, log_wanted = (F.log_softmax(x / temperature, dim=-1) for x in (found_BV, wanted_BV))
    return F.kl_div(log_found, log_wanted, reduction="batchmean", log_target=True) * temperature**2


def token_loss(
    found_BGV: Tensor, wanted_BGV: Tensor, matrix_BKG: Tensor, index_BK: Tensor, temperature: float
) -> Tensor:
    """Return the divergence of each kept token's distribution from the mean over the patches that it represents.

    found_BGV: the student's logits by patch; at a kept token's place they are that token's own.
    wanted_BGV: the teacher's logits by patch.
    matrix_BKG: weight of each patch in each kept token, from `OptimizedModel.provenance`.
    index_BK: places of the kept tokens, from the same.
    """
    shares_BKG = matrix_BKG / matrix_BKG.sum(dim=2, keepdim=True)
    wanted_BKV = torch.matmul(shares_BKG, F.softmax(wanted_BGV / temperature, dim=-1))
    log_found_BGV = F.log_softmax(found_BGV / temperature, dim=-1)
    log_found_BKV = log_found_BGV.gather(1, index_BK[..., None].expand(-1, -1, log_found_BGV.shape[-1]))
    rows = F.kl_div(log_found_BKV.flatten(0, 1), wanted_BKV.flatten(0, 1), reduction="batchmean")
    return rows * temperature**2


def scored(model: nn.Module, config: NetConfig, test_images: int) -> float:
    """Return the model's score on canvases of unseen digits, in [0, 1]."""
    task = TASKS[config.task]
    images, labels = task.draw(Split.test, 0, test_images, config.look, config.patch)
    return task.score(outputs_of(model, images), labels)


def _publish(results: list[Result], training: Training, strategy: str, out: Path | None) -> None:
    rows = [
        [r.net, r.seed, f"{r.flops_ratio:.3f}", *(f"{100 * s:.1f} %" for s in (r.original, r.off_the_shelf, r.trained))]
        for r in results
    ]
    headers = ["net", "seed", "FLOPs", "original", "off the shelf", "trained"]
    typer.echo(tabulate(rows, headers, disable_numparse=True), err=out is None)
    publish(
        {
            "bench": "finetune",
            "strategy": strategy,
            "training": asdict(training),
            "processes": _world(),
            "environment": asdict(Environment.here("cpu")),
            "rows": [asdict(result) for result in results],
        },
        out,
    )


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the nets are too small for a second thread to help
    typer.run(main)
