"""A large folder of pictures, or a parquet table of them, to embeddings in parquet, by Ray Data on many machines.

    pip install "gtp-fx[fleet]"
    python examples/embed_with_ray.py pictures embeddings --pretrained --workers 8
    python examples/embed_with_ray.py table.parquet embeddings --image jpg --id key

The model is optimised and compiled once, here, into a file that needs no compiler (AOTInductor); each actor loads that
file once. What is in `embeddings/` already is not done again, so a run that was broken off, or to which pictures were
added, continues. A picture that can't be read has no embedding, and `error` says why. On several machines both paths
have to be on storage that all of them see.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

import gtp_fx
from gtp_fx.cli.models import load_named
from gtp_fx.measure.preparation import Preparation, preparation_of

KINDS = ["jpg", "jpeg", "png", "webp"]


def made(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What there is to know of the program in `out`, which is made where there is none."""
    about, program = out / "about.json", out / "program.pt2"
    if about.exists():
        found = json.loads(about.read_text())
        if found["asked"] != asked:
            raise typer.BadParameter(f"{out} has embeddings of {found['asked']}: give another folder for {asked}")
        return dict(found)
    loaded = load_named(asked["model"], pretrained=asked["pretrained"])
    model: Any = loaded.model
    model = model.reset_classifier(0) or model  # timm's: embeddings instead of logits
    prepare = preparation_of(model)
    fast = gtp_fx.optimize(model, flops_budget=asked["flops_budget"], compile=False)
    if torch.cuda.is_available():
        fast = fast.cuda()
    out.mkdir(parents=True, exist_ok=True)
    print(gtp_fx.export(fast, program, asked["format"], progress=True))
    found = {
        "asked": asked,
        "weights": loaded.weights_origin,
        "flops_ratio": fast.report.flops_ratio,
        "schedule": json.loads(fast.schedule.to_json()),
        "preparation": {"config": dict(prepare.config), "size": prepare.size, "source": prepare.source},
    }
    about.write_text(json.dumps(found, indent=2))
    return found


class Prepare:
    """Encoded pictures as the model wants them, [n, 3, H, W]; where actors have a GPU each, in other processes.

    id, image: names of columns.
    """

    def __init__(self, preparation: dict[str, Any], id: str, image: str) -> None:
        self.size, self.transform = preparation["size"], Preparation(**preparation).transform()
        self.id, self.image = id, image

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        images, errors = np.zeros((len(batch[self.id]), *self.size), np.float32), []
        for image, encoded in zip(images, batch[self.image], strict=True):
            try:
                # A column of Hugging Face's datasets holds {"bytes": …, "path": …}.
                encoded = encoded["bytes"] if isinstance(encoded, dict) else encoded
                with Image.open(io.BytesIO(encoded)) as picture:
                    image[:] = self.transform(picture.convert("RGB")).numpy()
                errors.append("")
            except Exception as error:  # one broken file of a million ends nothing
                errors.append(f"{type(error).__name__}: {error}")
        return {self.id: batch[self.id], "image": images, "error": errors}


class Embed:
    """The program, loaded once an actor."""

    def __init__(self, program: bytes, format: str, id: str) -> None:
        self.id = id
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "program.pt2"
            file.write_bytes(program)
            if format == "aoti":
                self.run: Any = torch._inductor.aoti_load_package(str(file))
            else:
                self.run = torch.export.load(file).module()

    @torch.no_grad()
    def __call__(self, batch: dict[str, np.ndarray]) -> Any:
        import pyarrow as pa

        images = torch.from_numpy(np.array(batch["image"])).to(self.device)
        rows = self.run(images).float().cpu().numpy()
        width, broken = rows.shape[1], np.array([bool(error) for error in batch["error"]])
        embeddings = pa.FixedSizeListArray.from_arrays(rows.ravel(), width, mask=pa.array(broken))
        return pa.table({self.id: batch[self.id], "embedding": embeddings, "error": batch["error"]})


def main(
    source: Annotated[Path, typer.Argument(help="A folder of pictures, at any depth, or a parquet file or folder.")],
    out: Annotated[Path, typer.Argument(help="Where the program and the embeddings go.")],
    image: Annotated[str | None, typer.Option(help="Column of a parquet table with encoded pictures.")] = None,
    id: Annotated[str, typer.Option(help="Its column of names, each once.")] = "id",
    model: Annotated[str, typer.Option(help="timm's name.")] = "vit_base_patch16_clip_224",
    flops_budget: Annotated[float, typer.Option(help="FLOPs after / before at most.")] = 0.74,
    workers: Annotated[int, typer.Option(help="Actors that run the model.")] = 1,
    cpus: Annotated[float, typer.Option(help="CPUs of each.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Pictures per run.")] = 64,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download its weights.")] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing: for a few pictures.")] = False,
) -> None:
    import ray  # here, so that --help answers without it
    from pyarrow.dataset import dataset, field
    from ray.data.checkpoint import CheckpointConfig

    format = "torch" if eager else "aoti"
    asked = {"model": model, "flops_budget": flops_budget, "pretrained": pretrained, "format": format}
    about = made(out, asked)
    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    if workers * cpus >= (there := ray.cluster_resources()["CPU"]):
        raise typer.BadParameter(f"{workers} actors take {workers * cpus:g} of {there:g} CPUs: none is left to read")
    if image is None:
        id = "path"
    # Rows whose part is written are noted by name, and dropped as they are read. Settings hold for later datasets.
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
        id, str((out / "done").resolve()), delete_checkpoint_on_success=False
    )
    if image is None:
        # Not read_images, which ends everything at the first file that isn't one.
        read, image = ray.data.read_binary_files(str(source), include_paths=True, file_extensions=KINDS), "bytes"
    else:
        read = ray.data.read_parquet(str(source), columns=[id, image])
    embedded = read.map_batches(Prepare(about["preparation"], id, image), batch_size=batch).map_batches(
        Embed,
        fn_constructor_args=((out / "program.pt2").read_bytes(), format, id),
        batch_size=batch,
        num_cpus=cpus,
        num_gpus=1 if torch.cuda.is_available() else 0,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    embedded.write_parquet(str((out / "parts").resolve()))
    parts = dataset(out / "parts", format="parquet")
    rows, broken = parts.count_rows(), parts.count_rows(filter=field("error") != "")
    print(
        f"{rows} rows in {out / 'parts'}, {broken} of them unreadable; "
        f"{about['flops_ratio']:.3f} of the FLOPs, weights: {about['weights']}"
    )


if __name__ == "__main__":
    typer.run(main)
