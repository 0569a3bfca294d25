"""`tpad serve` as a user has it: a process of its own on a free port, over a small shop with images."""

import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.fake_embeddings import publish_embeddings
from helpers.processes import ENVIRONMENT, ROOT, command
from pipeline.core.artifact import OWN_KEYS, Version, open_verified, stage
from pipeline.core.config_file import load_config
from recommender.training.train import train_sbr

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
SETTINGS = load_config(None, ["sbr.dim=8", "sbr.epochs=1", "sbr.batch=64"])


def write_shop(run: Path, data: Path) -> Path:
    """A run of `data`, with a title that must stay text and an image that is none."""
    shutil.copytree(data, run / "data")
    items = pq.read_table(run / "data" / "items.parquet")
    titles, images = items["title"].to_pylist(), items["image"].to_pylist()
    titles[7] = HOSTILE
    images[8]["bytes"] = b"no image at all"
    for name, values in (("title", titles), ("image", images)):
        place = items.column_names.index(name)
        items = items.set_column(place, items.schema.field(name), pa.array(values, items.schema.field(name).type))
    pq.write_table(items, run / "data" / "items.parquet")
    publish_embeddings(run, run / "data", np.arange(len(items)) % 6, SETTINGS)
    train_sbr(SETTINGS, run, run / "data")
    (run / "run.json").write_text('{"data": "data"}')
    return run


def publish_again(run: Path, **changed: bytes) -> Version:
    """The session model once more, as the next version; `changed` (file name without its dot -> content) is what differs."""
    before = open_verified(run / "sbr", "sbr", "")
    with stage(run / "sbr", "sbr") as staging:
        shutil.copytree(before.path, staging.path, dirs_exist_ok=True)
        for name, content in changed.items():
            (staging.path / name.replace("_", ".")).write_bytes(content)
        return staging.publish({key: value for key, value in before.manifest.items() if key not in OWN_KEYS} | {"again": before.name})


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.port = int(url.rsplit(":", 1)[1])
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def ask(self, path: str, body: Any = None, method: str | None = None, **headers: str) -> Answer:
        """`body`: bytes as they are, anything else as JSON."""
        if body is not None:
            headers = {"content-type": "application/json"} | headers
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read())


@contextmanager
def serving(run: Path, *options: object, **environment: str) -> Iterator[Server]:
    words = command("serve", "--run", run, "--port", 0, *options)
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT | environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        first = process.stderr.readline()
        match = re.search(r"http://\S+", first)
        assert match, first + process.stderr.read()
        server = Server(process, match[0])
        yield server
    finally:
        process.kill()
        process.wait()
    server.reader.join()
