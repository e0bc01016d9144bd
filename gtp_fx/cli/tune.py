"""`gtp-fx tune`: measure this machine's rates and save them."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gtp_fx.cli.arguments import AsJson, Dtype
from gtp_fx.cli.endings import explaining
from gtp_fx.errors import OptionError


def tune(
    device: Annotated[str, typer.Option(help="cpu or cuda; auto is the GPU where there is one.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Dtype of products and attention.")] = Dtype.float32,
    rounds: Annotated[int, typer.Option(help="Rounds of timing; each runs every probe once.")] = 9,
    anyway: Annotated[bool, typer.Option("--anyway", help="Keep what is measured on a busy machine, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure this machine's rates with a minute or two of small kernels, and save them for later predictions.

    On a GPU, tune the kernels' tiles too. A machine too busy to be measured is refused.
    """
    import torch

    from gtp_fx.kernels.available import has_kernels
    from gtp_fx.measure.tune_target import describe, tune_target
    from gtp_fx.options.progress import progress_bar
    from gtp_fx.targets import listed
    from gtp_fx.targets.tuned import as_dict, save_tuned

    with explaining():
        if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise OptionError(f"--device {device}: give cpu, cuda (where torch finds a GPU) or auto")
        if rounds < 1:
            raise OptionError(f"--rounds {rounds}: give at least one")
        with progress_bar() as show:
            # Choose tiles first, because the curves are measured with them.
            if has_kernels(torch.device(listed(device).device)):
                from gtp_fx.measure.tune_kernels import tune_kernels  # which imports Triton

                tune_kernels(torch.device("cuda"), getattr(torch, dtype.value), rounds, show)
            tuned = tune_target(listed(device), getattr(torch, dtype.value), rounds, show, anyway)
        file = save_tuned(tuned)
    if as_json:
        typer.echo(json.dumps(as_dict(tuned), indent=2))
        return
    typer.echo(describe(tuned))
    typer.echo(f"\nkept in {file}; delete it to go back to the table's figures")
