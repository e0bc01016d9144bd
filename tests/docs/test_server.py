"""The example of a server: many clients at once get what the model says of their picture, and nothing is compiled."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
from PIL import Image

from gtp_fx.cli.photo import load_photo
from gtp_fx.measure.preparation import preparation_of

from support.checkout import ROOT
from support.small_models import small

FILE = ROOT / "examples" / "server.py"


@pytest.fixture
def server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_server", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def ask(url: str, body: bytes | None = None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, body, timeout=100) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_twenty_clients_get_their_own_answers_and_nothing_is_compiled(
    server: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend="eager"))
    photo = load_photo().resize((200, 180))
    fast, pictures = small(depth=2, compile=True), [photo.rotate(17 * number) for number in range(20)]
    prepare = preparation_of(fast).transform()
    with torch.no_grad():
        rows = fast.graph_module(torch.stack([prepare(picture) for picture in pictures])).softmax(-1)
    batcher = server.Batcher(fast, (1, 4, 8), 0.05, 64, server.Metrics())
    serving = server.Server(("127.0.0.1", 0), batcher, 100)
    before = server.compilations()
    url = f"http://127.0.0.1:{serving.server_port}"
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    try:
        with ThreadPoolExecutor(20) as clients:
            answers = list(clients.map(lambda picture: ask(f"{url}/classify", png(picture)), pictures))
        for (status, text), row in zip(answers, rows, strict=True):
            assert status == 200
            for told in json.loads(text)["classes"]:
                # Products of other batches are summed in another order.
                assert told["probability"] == pytest.approx(float(row[told["class"]]), rel=1e-4)
        found: dict[str, float] = {
            name: float(value) for name, value in (line.split(" ") for line in ask(f"{url}/metrics")[1].splitlines())
        }
        assert found["server_compilations_total"] == before > 0
        batches = {size: found.get(f'server_batches_total{{size="{size}"}}', 0) for size in (1, 4, 8)}
        assert sum(size * count for size, count in batches.items()) == 20 + found["server_images_added_total"]
        assert sum(batches.values()) < 20, "some were run together"
        assert 0 < found['server_latency_seconds{quantile="0.5"}'] <= found['server_latency_seconds{quantile="0.99"}']
        assert ask(f"{url}/health") == (200, '{"alive": true}')
        assert ask(f"{url}/classify", b"no picture")[0] == 400 and ask(f"{url}/elsewhere")[0] == 404
        assert ask(f"{url}/classify", b"")[0] == 413
        told = serving.metrics.report()
        assert "20 answers: 50% within" in told and f"{before} compilations" in told
    finally:
        serving.shutdown()
        thread.join()
        batcher.stop()
        serving.server_close()
    assert not batcher.thread.is_alive()


@pytest.mark.nightly
def test_it_runs_as_it_stands_and_stops_when_told() -> None:
    command = (sys.executable, str(FILE), "--eager", "--port", "0")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            told = [process.stdout.readline() for _ in range(2)]
            assert "weights: random" in told[0]
            found = re.search(r"listening on (http\S+)", told[1])
            assert found is not None
            assert ask(f"{found[1]}/classify", png(load_photo()))[0] == 200
        finally:
            process.send_signal(signal.SIGTERM)
        try:
            said, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert "1 answers: 50% within" in said
    assert process.returncode == 0
