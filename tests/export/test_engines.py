"""Tests the engines of the export: a server of embeddings, here one over the folder of `tpad export-model`, and a cluster of Ray."""

import base64
import io
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F

from helpers.backbones import save_backbone
from helpers.processes import ENVIRONMENT, ROOT, command, contents, kill_a_ray_worker, tpad
from helpers.runs import change_items, distill_run, export_run, published_folder, settings
from pipeline.core.errors import ENVIRONMENT as ENVIRONMENT_ERROR
from pipeline.core.errors import USAGE, UserError
from pipeline.data.embeddings import read_embeddings
from pipeline.export.export import export
from pipeline.mllm.sentence_transformer import export_model
from pipeline.run_folder import remember


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# --- a server


@contextmanager
def embedding_server(folder: Path, normalized: bool = False, wrong: bool = False) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Answers like vLLM: the pooled states of Transformer and Pooling of a folder. Yields its URL, and the requests it gets.

    The first request fails, as a server that is busy does."""
    transformer, pooling = list(SentenceTransformer(str(folder), device="cpu"))[:2]
    model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    requests: list[dict[str, Any]] = []
    lock = threading.Lock()

    def states(body: dict[str, Any]) -> torch.Tensor:
        if "messages" in body:
            (message,) = body["messages"]
            item = {part["type"]: part for part in message["content"]}
            image = base64.b64decode(item["image_url"]["image_url"]["url"].partition("base64,")[2])
            shown = {"image": Image.open(io.BytesIO(image)).convert("RGB")} | ({"text": item["text"]["text"]} if "text" in item else {})
            return torch.tensor(model.encode([shown]))
        pooled = []
        for ids in body["input"]:
            features = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
            with torch.inference_mode():
                pooled.append(model(features)["sentence_embedding"][0])
        return torch.stack(pooled)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "unified"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                requests.append(body | {"authorization": self.headers["authorization"]})
                if len(requests) == 1:
                    self.send_error(503)
                    return
                vectors = states(body)
            vectors = vectors.flip(1) if wrong else F.normalize(vectors) if normalized else vectors
            self.answer({"data": [{"index": n, "embedding": vector.tolist()} for n, vector in reversed(list(enumerate(vectors)))]})

        def answer(self, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()


@pytest.fixture(scope="module")
def served(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A data folder in which some items have an image, some a text and some both; a run without embeddings; the model's folder."""
    folder = tmp_path_factory.mktemp("served")
    data = change_items(tiny_data, folder / "data", dict.fromkeys(range(0, 40, 3)), {4: ""})
    shutil.copytree(tiny_run / "mllm", folder / "run" / "mllm")
    export_model(tiny_run, tiny_data, folder / "model", text_only=False)
    return data, folder / "run", folder / "model"


def test_a_server_of_pooled_states_gives_the_vectors_of_this_machine(
    served: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run, folder = served
    monkeypatch.setenv("OPENAI_API_KEY", "a secret")
    local = Path(shutil.copytree(run, tmp_path / "local"))
    export_run(local, data)
    with embedding_server(folder, normalized=True) as (url, requests):
        outcome = export(settings(), run, data, engine=url)
    assert outcome.work.items == 40
    ours, theirs = read_embeddings(local / "embeddings"), read_embeddings(run / "embeddings")
    for half in ("knowledge", "transition"):
        np.testing.assert_allclose(theirs.vectors[half], ours.vectors[half], atol=1e-4)
    np.testing.assert_array_equal(theirs.has_image, ours.has_image)
    assert all(request["model"] == "unified" and request["authorization"] == "Bearer a secret" for request in requests)
    assert any("messages" in request for request in requests) and any("input" in request for request in requests)
    assert theirs.version.manifest["engine"] == "server" and "engine" not in ours.version.manifest


def test_a_server_of_another_model_is_refused_before_anything_is_exported(served: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data, run, folder = served
    run = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("embeddings")))
    with embedding_server(folder, wrong=True) as (url, _), pytest.raises(UserError, match="gives other vectors than the MLLM") as error:
        export(settings(), run, data, engine=url)
    assert error.value.code == ENVIRONMENT_ERROR
    assert not list((run / "embeddings").rglob("part-*"))


@pytest.mark.slow
def test_the_chat_templates_first_tokens_are_taken_out_of_a_servers_mean(tiny_data: Path, tmp_path: Path) -> None:
    data = change_items(tiny_data, tmp_path / "data", dict.fromkeys(range(40)), {})
    more = [f"backbone.name={save_backbone(tmp_path / 'backbone', 'qwen3_vl')}", "export.attention=eager"]
    distill_run(tmp_path / "run", data, *more)
    export_model(tmp_path / "run", data, tmp_path / "model", text_only=True)
    local = Path(shutil.copytree(tmp_path / "run", tmp_path / "local"))
    export_run(local, data, *more)
    with embedding_server(tmp_path / "model") as (url, _):
        export(settings(*more), tmp_path / "run", data, engine=f"{url}/v1/")
    ours, theirs = read_embeddings(local / "embeddings"), read_embeddings(tmp_path / "run" / "embeddings")
    np.testing.assert_allclose(theirs.transition, ours.transition, atol=1e-4)
    with (
        embedding_server(tmp_path / "model", normalized=True) as (url, _),
        pytest.raises(UserError, match=r"vectors of length one, not the mean itself .*; switch its normalising off"),
    ):
        export(settings(*more, "export.dtype=float16"), tmp_path / "run", data, engine=url)


def test_an_engine_that_is_none_is_one_line(served: tuple[Path, Path, Path]) -> None:
    data, run, _ = served
    remember(run, data, settings())
    wrong = tpad("export-embeddings", "--run", run, "--engine", "cluster")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (USAGE, 1)
    assert "neither `ray` nor a URL" in wrong.stderr
    both = tpad("export-embeddings", "--run", run, "--engine", "ray", "--shard", "1/2")
    assert both.returncode == USAGE


def test_no_server_is_one_line(served: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.export.server_engine.ATTEMPTS", 2)
    data, run, _ = served
    with pytest.raises(UserError, match=r"no answer from the server of embeddings: .*refused.*/v1/models") as error:
        export(settings("export.shard_rows=7"), run, data, engine="http://127.0.0.1:9")
    assert error.value.code == ENVIRONMENT_ERROR


# --- Ray


@pytest.mark.slow
def test_on_ray_a_killed_worker_costs_no_part_and_no_byte(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """On a local Ray of two workers, one of which is killed half-way."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    for folder in (alone, run):
        shutil.copytree(tiny_run / "mllm", folder / "mllm")
        remember(folder, tiny_data, settings("export.shard_rows=1"))
    export_run(alone, tiny_data, "export.shard_rows=1")
    words = command("export-embeddings", "--run", run, "--engine", "ray")
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    killed = kill_a_ray_worker(process, lambda: len(list((run / "embeddings").glob(".staging-*/part-*"))) >= 3)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    assert killed
    assert contents(published_folder(run, "embeddings")) == contents(published_folder(alone, "embeddings"))
