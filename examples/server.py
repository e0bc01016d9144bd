"""A classifier behind HTTP: requests wait a moment for each other, and run as one batch of one of a few sizes.

    python examples/server.py --model deit_small_patch16_224 --pretrained --port 8000
    curl --data-binary @photo.jpg http://localhost:8000/classify
    curl http://localhost:8000/metrics

It listens once everything is compiled (`warm_up`); /metrics counts compilations, and none is added after that. Stopped
by Ctrl-C or SIGTERM, it prints its latencies. It needs nothing beside gtp_fx.
"""

from __future__ import annotations

import io
import json
import queue
import signal
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor
from torch._dynamo.utils import counters

import gtp_fx
from gtp_fx.cli.models import load_named
from gtp_fx.measure.preparation import preparation_of

QUANTILES = (0.5, 0.9, 0.99)


@dataclass
class Metrics:
    """What has happened since the start.

    counts: answers by HTTP status, batches by size, and images that were added to fill batches.
    latencies: seconds from a request's body to its answer, of the last ten thousand.
    """

    counts: Counter[str] = field(default_factory=Counter)
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=10_000))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str, by: int = 1) -> None:
        with self.lock:
            self.counts[what] += by

    def took(self, seconds: float) -> None:
        with self.lock:
            self.latencies.append(seconds)

    def quantiles(self) -> dict[float, float]:
        """Seconds, by quantile; none before the first answer."""
        with self.lock:
            found = sorted(self.latencies)
        return {q: found[min(len(found) - 1, int(q * len(found)))] for q in QUANTILES} if found else {}

    def as_text(self) -> str:
        """In Prometheus's format."""
        with self.lock:
            lines = [f"server_{name} {count}" for name, count in sorted(self.counts.items())]
        lines.append(f"server_compilations_total {compilations()}")
        lines += [f'server_latency_seconds{{quantile="{q}"}} {seconds:.6f}' for q, seconds in self.quantiles().items()]
        return "\n".join(lines) + "\n"

    def report(self) -> str:
        """For people."""
        latencies = ", ".join(f"{q:.0%} within {1e3 * seconds:.1f} ms" for q, seconds in self.quantiles().items())
        batches = {name: count for name, count in sorted(self.counts.items()) if name.startswith("batches_total")}
        return f"{len(self.latencies)} answers: {latencies or 'none'}\n{batches}; {compilations()} compilations"


def compilations() -> int:
    """Graphs that Dynamo has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


class Batcher:
    """One thread, which runs the model: what is compiled belongs to its mode, and CUDA graphs to their thread.

    sizes: numbers of images in a batch. A batch is filled up with zeros to the least that it fits.
    wait: seconds that a batch waits for more images, from its first one.
    most: images that may wait at once; more are turned away.
    """

    def __init__(
        self, model: gtp_fx.OptimizedModel, sizes: tuple[int, ...], wait: float, most: int, metrics: Metrics
    ) -> None:
        self.model, self.sizes, self.wait, self.metrics = model, tuple(sorted(sizes)), wait, metrics
        self.dtype = next(model.parameters()).dtype
        self.waiting: queue.Queue[tuple[Tensor, Future[Tensor]] | None] = queue.Queue(most)
        self.ready: Future[None] = Future()
        self.thread = threading.Thread(target=self._run, name="batcher")
        self.thread.start()

    def ask(self, image: Tensor) -> Future[Tensor]:
        """The output of [1, 3, H, W], a row, once it is there. Raises queue.Full."""
        answer: Future[Tensor] = Future()
        self.waiting.put_nowait((image, answer))
        return answer

    def stop(self) -> None:
        """Stop after what is waiting."""
        self.waiting.put(None)
        self.thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            self.model.warm_up(self.sizes)
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        more = True
        while more:
            asked, more = self._gathered()
            if not asked:
                continue
            try:
                rows = self._rows([image for image, _ in asked])
            except Exception as error:  # those who asked are told, and the others are served
                for _, answer in asked:
                    answer.set_exception(error)
                continue
            for (_, answer), row in zip(asked, rows, strict=True):
                answer.set_result(row)

    def _gathered(self) -> tuple[list[tuple[Tensor, Future[Tensor]]], bool]:
        """What a batch has, and whether more will come."""
        first = self.waiting.get()
        if first is None:
            return [], False
        asked, until = [first], time.monotonic() + self.wait
        while len(asked) < self.sizes[-1]:
            try:
                following = self.waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if following is None:
                return asked, False
            asked.append(following)
        return asked, True

    def _rows(self, images: list[Tensor]) -> Tensor:
        """[images, classes] on the CPU."""
        size = next(size for size in self.sizes if size >= len(images))
        self.metrics.count(f'batches_total{{size="{size}"}}')
        self.metrics.count("images_added_total", size - len(images))
        batch = torch.cat([*images, images[0].new_zeros(size - len(images), *images[0].shape[1:])])
        device = next(self.model.parameters()).device
        output: Tensor = self.model(batch.to(device, non_blocking=True))
        return output[: len(images)].float().cpu()


class Handler(BaseHTTPRequestHandler):
    """A connection."""

    protocol_version = "HTTP/1.1"  # connections are kept
    server: Server

    def do_GET(self) -> None:
        alive = self.server.batcher.thread.is_alive()
        if self.path == "/health":
            self._answer(200 if alive else 500, json.dumps({"alive": alive}))
        elif self.path == "/metrics":
            self._answer(200, self.server.metrics.as_text(), "text/plain; version=0.0.4")
        else:
            self._answer(404, json.dumps({"error": "there are /classify, /health and /metrics"}))

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if self.path != "/classify" or not 0 < size <= self.server.most_bytes:
            self.close_connection = True  # the body stays unread
            wrong = "POST to /classify" if self.path != "/classify" else f"1 to {self.server.most_bytes} bytes"
            self._told(404 if self.path != "/classify" else 413, {"error": f"give a picture: {wrong}"})
            return
        body, start = self.rfile.read(size), time.monotonic()
        status, told = self.server.classify(body)
        if status == 200:
            self.server.metrics.took(time.monotonic() - start)
        self._told(status, told)

    def _told(self, status: int, told: dict[str, Any]) -> None:
        self.server.metrics.count(f'answers_total{{status="{status}"}}')
        self._answer(status, json.dumps(told))

    def _answer(self, status: int, text: str, kind: str = "application/json") -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing by request; /metrics has the sums."""


class Server(ThreadingHTTPServer):
    """Listens once the model is warm."""

    request_queue_size = 128
    most_bytes = 20_000_000

    def __init__(self, address: tuple[str, int], batcher: Batcher, timeout: float) -> None:
        batcher.ready.result()
        self.prepare = preparation_of(batcher.model).transform()
        self.batcher, self.metrics, self.patience = batcher, batcher.metrics, timeout
        super().__init__(address, Handler)

    def classify(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """A status, and what is told."""
        try:
            with Image.open(io.BytesIO(body)) as picture:
                image = self.prepare(picture.convert("RGB"))[None].to(self.batcher.dtype)
        except Exception as error:  # Pillow has many, for files that are none of its kinds or broken
            return 400, {"error": f"no picture: {error}"}
        try:
            row = self.batcher.ask(image).result(self.patience)
        except queue.Full:
            return 503, {"error": "too many are waiting"}
        except TooLate:
            return 504, {"error": f"no answer within {self.patience} s"}
        except Exception as error:
            return 500, {"error": f"{type(error).__name__}: {error}"}
        best = row.softmax(0).topk(min(5, len(row)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return 200, {"classes": [{"class": number, "probability": share} for number, share in pairs]}


def interrupt(*_: object) -> None:
    """End like by Ctrl-C, which itself is ignored where a shell started the server in the background."""
    raise KeyboardInterrupt


def main(
    model: Annotated[
        str | None,
        typer.Option(help="As for gtp-fx; test_vit by default. With --saved, what was saved, if it is your own."),
    ] = None,
    flops_budget: Annotated[float, typer.Option(help="FLOPs after / before at most.")] = 0.74,
    saved: Annotated[Path | None, typer.Option(help="Or a folder that save_pretrained wrote.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Its compiled code, as gtp-fx export wrote it.")] = None,
    sizes: Annotated[str, typer.Option(help="Batches that are run.")] = "1,4,16",
    wait_ms: Annotated[float, typer.Option(help="How long a batch waits for more pictures.")] = 5.0,
    most: Annotated[int, typer.Option(help="Pictures that may wait; more are answered 503.")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is answered 504.")] = 30.0,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download the weights.")] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing.")] = False,
) -> None:
    if cache is not None:
        gtp_fx.load_cache(cache)
    if saved is not None:
        own = None if model is None else load_named(model).model
        fast, origin = gtp_fx.load(saved, own, compile=not eager), str(saved)
    else:
        loaded = load_named(model or "test_vit", pretrained=pretrained)
        fast = gtp_fx.optimize(loaded.model, flops_budget=flops_budget, compile=not eager)
        origin = loaded.weights_origin
    if torch.cuda.is_available():
        fast = fast.cuda()
    print(f"weights: {origin}; {fast.report.flops_ratio:.3f} of the FLOPs; warming up", flush=True)
    start, metrics = time.monotonic(), Metrics()
    batcher = Batcher(fast, tuple(int(size) for size in sizes.split(",")), wait_ms / 1e3, most, metrics)
    server = Server((host, port), batcher, timeout)
    warm = f"{compilations()} compilations in {time.monotonic() - start:.1f} s"
    print(f"{warm}; listening on http://{host}:{server.server_port}", flush=True)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        batcher.stop()
        server.server_close()
        print(metrics.report(), flush=True)


if __name__ == "__main__":
    typer.run(main)
