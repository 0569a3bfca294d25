"""Tests `--download-images` against a local server: cached, limited, and kept away from private networks."""

import io
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.prepare import download
from pipeline.data.prepare.prepare import PrepareOptions, PrepareSummary, prepare

LOG = "session_id,item_id,timestamp\na,1,1700000000\na,2,1700000001\na,3,1700000002\na,4,1700000003\n"
asked: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked[self.path] += 1
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG")
        body = {"/big.png": b"x" * 300_000, "/empty.png": b""}.get(self.path, buffer.getvalue())
        self.send_response(302 if self.path == "/moved.png" else 404 if self.path == "/gone.png" else 200)
        if self.path == "/moved.png":
            self.send_header("Location", "/1.png")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[str]:
    asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def options(folder: Path, urls: list[str], column: str = "image_url", **more: bool) -> PrepareOptions:
    (folder / "log.csv").write_text(LOG)
    (folder / "items.csv").write_text(
        f"item_id,title,{column}\n" + "".join(f"{n},T,{url}\n" for n, url in enumerate([*urls, "", "", ""], 1))
    )
    more = {"download_images": True, "allow_private": True} | more
    return PrepareOptions(folder / "items.csv", folder / "log.csv", folder / "out", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("column", ["image_url", "image"])
def test_images_are_fetched_once_and_failures_counted(tmp_path: Path, site: str, column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_IMAGE_BYTES", 200_000)
    urls = [f"{site}/1.png", f"{site}/moved.png", f"{site}/gone.png", f"{site}/big.png", "", f"{site}/1.png", f"{site}/empty.png"]
    for times in (1, 2):
        summary = PrepareSummary()
        prepare(options(tmp_path, urls, column), summary)
        assert summary.images == 3
        assert any("3 images cannot be fetched" in note and "/gone.png" in note for note in summary.notes), summary.notes
        assert asked["/1.png"] == 2 and asked["/moved.png"] == 1 and asked["/gone.png"] == times  # what is there is not fetched again
    catalog = load_catalog(tmp_path / "out")
    assert [catalog.has_image(row) for row in range(7)] == [True, True, False, False, False, True, False]


def test_private_networks_are_refused(tmp_path: Path, site: str) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1 is an address of a private network.*--allow-private-addresses") as caught:
        prepare(options(tmp_path, [f"{site}/1.png"], allow_private=False))
    assert caught.value.code == DATA and not asked and not (tmp_path / "out" / "items.parquet").exists()


def test_addresses_without_download_are_said_and_options_without_effect_refused(tmp_path: Path, site: str) -> None:
    summary = prepare(options(tmp_path, [f"{site}/1.png"], download_images=False, allow_private=False))
    assert not asked and any("--download-images" in note for note in summary.notes)
    with pytest.raises(UserError, match="--download-images has no effect") as caught:
        prepare(options(tmp_path, ["red"], "colour"))
    assert caught.value.code == USAGE
