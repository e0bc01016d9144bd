"""Self-distillation through an optimised graph: it learns, two processes stay equal, patch labels average."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.digit_nets import NetConfig, build
from bench.digits import Look, Split
from bench.finetune import Training, distil, divergence_loss, optimised, token_loss
from bench.tasks import TASKS

pytestmark = pytest.mark.nightly

TINY = NetConfig(look=Look(side=32, pieces=2, strokes=1), width=32, depth=3, heads=2)
SHORT = Training(steps=40, batch=16, rate=1e-3)


@pytest.mark.parametrize("task", ["digits", "patches"])
def test_it_learns_what_the_original_says(task: str) -> None:
    torch.manual_seed(0)
    config = replace(TINY, task=task, class_token=task == "digits")
    teacher = build(config).eval()
    torch.nn.init.normal_(teacher.head.weight, std=0.3)
    images, _ = TASKS[task].draw(Split.test, 0, 64, config.look, config.patch)
    before = copy.deepcopy(teacher.state_dict())
    student = optimised(teacher, config, 0.5, "gtp")
    apart = _apart(student, teacher, images)
    assert len(distil(student, teacher, config, SHORT)) == SHORT.steps and not student.training
    assert _apart(student, teacher, images) < 0.95 * apart
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items()), (
        "the teacher's are its own"
    )


@torch.no_grad()
def _apart(student: torch.nn.Module, teacher: torch.nn.Module, images: torch.Tensor) -> float:
    found, wanted = (model(images).flatten(0, -2) for model in (student, teacher))
    return divergence_loss(found, wanted, 1.0).item()


def test_a_token_learns_from_the_patches_it_stands_for() -> None:
    """Two tokens of three patches: the second stands for two, at weights 1 and 3."""
    matrix = torch.tensor([[[2.0, 0, 0], [0, 1, 3]]])
    index = torch.tensor([[0, 2]])
    wanted = torch.tensor([[[5.0, 0, 0], [0, 5, 0], [0, 0, 5]]])
    shares = wanted.softmax(-1)[0]
    right = torch.stack([shares[0], torch.zeros(3), 0.25 * shares[1] + 0.75 * shares[2]]).clamp(min=1e-9).log()[None]
    assert token_loss(right, wanted, matrix, index, 1.0).item() == pytest.approx(0, abs=1e-6)
    other = right.clone()
    other[0, 1] = torch.tensor([9.0, 0, 0])  # no token stands there
    assert token_loss(other, wanted, matrix, index, 1.0).item() == pytest.approx(0, abs=1e-6)
    other[0, 2] = wanted[0, 2]
    assert token_loss(other, wanted, matrix, index, 1.0) > 0.1
    assert divergence_loss(wanted[0], wanted[0], 2.0).item() == pytest.approx(0, abs=1e-6)


def _train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    teacher = build(TINY).eval()
    torch.nn.init.normal_(teacher.head.weight)
    student = optimised(teacher, TINY, 0.5, "gtp")
    losses = distil(student, teacher, TINY, replace(SHORT, steps=3))
    torch.save({"losses": losses, "state": student.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_stay_equal(tmp_path: Path) -> None:
    mp.spawn(_train, (str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["losses"] != other["losses"], "each saw canvases of its own"
    assert all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())
