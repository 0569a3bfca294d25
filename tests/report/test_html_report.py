"""Tests the report (self-contained, complete, titles escaped) and the output of `tpad doctor`."""

import io
import json
import re
import subprocess
import tomllib
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.processes import CHROMIUM, ROOT, tpad_from_nothing
from pipeline.core.config_file import load_config
from recommender.doctor import SERVE
from recommender.report.html_report import SESSIONS, write_report
from recommender.training.train import train_sbr

HOSTILE = "<script>document.title='taken'</script>\"'&"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with hostile titles; a third of the items have an image, one of which is damaged."""
    run = tmp_path_factory.mktemp("run")
    group, settings = write_data(run / "data"), load_config(None, ["sbr.dim=16", "sbr.epochs=1", "sbr.models=[full]"])
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(file, "PNG")
    items = pq.read_table(run / "data" / "items.parquet")
    titles = [HOSTILE if n < 40 else title for n, title in enumerate(items["title"].to_pylist())]
    images = [{"bytes": b"broken" if n == 3 else file.getvalue(), "path": None} if n % 3 == 0 else None for n in range(len(items))]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    items = items.set_column(1, "title", pa.array(titles)).append_column("image", pa.array(images, kind))
    pq.write_table(items, run / "data" / "items.parquet")
    publish_embeddings(run, run / "data", group, settings)
    train_sbr(settings, run, run / "data")
    (run / "distill").mkdir()
    lines = [{"phase": "align", "step": n, "loss": 5 / (n + 1), "club_bound": 0.1, "held_out_club_bound": 0.2} for n in range(300)]
    (run / "distill" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "al')
    return write_report(run, run / "data", "sbr: {epochs: 1}\n")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_report_is_one_file_with_all_sections(report: Path) -> None:
    html = report.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(html)
    names = [name for name, _ in tags.seen]
    assert not {"script", "link", "iframe", "img"} & set(names)
    links = [value or "" for _, attributes in tags.seen for name, value in attributes.items() if name in ("href", "src")]
    assert links
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    drawn = {attributes["id"] for name, attributes in tags.seen if name == "symbol"}
    assert {link[1:] for link in links if link.startswith("#")} <= drawn
    assert len([name for name, attributes in tags.seen if attributes.get("class") == "session"]) == SESSIONS
    assert re.findall("<h2>(.*?)</h2>", html) == [
        *("Results", "Test sessions", "The catalogue, by each half of the vectors", "Training of the MLLM"),
        *("Training of the session model", "Index", "Settings"),
    ]
    metrics = json.loads((report.parent / "sbr" / "v0001" / "metrics.json").read_text())["results"]
    assert f"{metrics['full']['mean']['all']['MRR@20']:.4f}" in html


def test_intervals_contain_their_values(report: Path) -> None:
    row = re.search(r"<tr class=ours>(.*?)</tr>", report.read_text(encoding="utf-8"))
    assert row is not None
    cells = re.findall(r"<td>([\d.]+)<small>([\d.]+) – ([\d.]+)</small>", row[1])
    assert len(cells) == 4
    assert all(float(low) < float(value) < float(high) for value, low, high in cells)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install the package chromium to run this")
def test_a_browser_shows_hostile_titles_as_text(report: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, report.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    assert "<title>tpad: " in done.stdout
    assert "<script>" not in done.stdout
    assert "&lt;script&gt;document.title='taken'&lt;/script&gt;" in done.stdout


def test_doctor_reports_packages_and_machine_in_one_screen() -> None:
    done = tpad_from_nothing("doctor")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 24
    for word in ("torch 2", "faiss-", "memory", "disk", "training, export", "GPU"):
        assert word in done.stdout
    assert max(map(len, lines)) <= 140
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, serve = (
        [re.match(r"[\w.-]+", line)[0] for line in lines] for lines in (project["dependencies"], project["optional-dependencies"]["serve"])
    )
    assert all(f"{name} {version(name)}" in " ".join(done.stdout.split()) for name in needed)
    assert {*SERVE} == {*serve}


def test_doctor_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "faiss.py").write_text("raise ImportError('no such symbol')\n")
    done = tpad_from_nothing("doctor", cwd=tmp_path)  # where modules are looked for first
    assert done.returncode == 5
    assert "FAISS cannot be loaded: no such symbol" in done.stdout
    assert done.stderr.startswith("error: something is missing")
