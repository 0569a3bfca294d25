"""A command that is killed at any call of the file system, and repeated, ends as if nothing had happened, and leaves nothing over."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.killing import killed_and_repeated, run_watched
from helpers.runs import SETTINGS
from pipeline.core.config_file import load_config
from pipeline.data.catalog import load_catalog
from pipeline.data.session_log import load_sessions

Words = Callable[[Path], Sequence[object]]
QUICK = ["sbr.dim=8", "sbr.epochs=1", "sbr.models=[ID-only]", "sbr.batch=256"]
SET = [word for setting in QUICK for word in ("--set", setting)]


def prepared(folder: Path) -> Sequence[object]:
    return "prepare", "--items", folder / "items.csv", "--sessions", folder / "events.csv", "--out", folder / "out"


COMMANDS: dict[str, Words] = {
    "index": lambda run: ("index", "--run", run, "--set", "sbr.index=hnsw"),
    "evaluate": lambda run: ("evaluate", "--run", run, "--models", "popularity,ID-only", *SET),
    "train-sbr": lambda run: ("train-sbr", "--run", run, *SET, "--set", "sbr.lr=1e-3"),
    "report": lambda run: ("report", "--run", run),
    "recommend": lambda run: ("recommend", "--run", run, "--sessions", run / "data" / "sessions.parquet", "--out", run / "ranked.parquet"),
}


def every(count: int) -> Sequence[int]:
    return range(1, count + 1)


def some(*shares: float) -> Callable[[int], Sequence[int]]:
    return lambda count: sorted({max(1, round(share * count)) for share in shares})


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a catalogue and a log as CSV, and the data folder of an earlier, larger version of both."""
    folder = tmp_path_factory.mktemp("raw")
    for size, more in ((30, 10), (24, 0)):
        (folder / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},title {n} of {size}\n" for n in range(size)))
        (folder / "events.csv").write_text(
            "session_id,item_id,timestamp\n" + "".join(f"s{n // 3},i{(n * 7) % size},{1_600_000_000 + n}\n" for n in range(60 + more))
        )
        if more:
            assert run_watched(prepared(folder), folder)[0] == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    group = write_data(run / "data", items=40, sessions=80)
    publish_embeddings(run, run / "data", group, load_config(None, QUICK))
    assert run_watched(("train-sbr", "--run", run, "--data", run / "data", *SET), run)[0] == 0
    return run


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path, tiny_data: Path) -> Path:
    run = tmp_path_factory.mktemp("distilled") / "run"
    shutil.copytree(tiny_run / "mllm", run / "mllm")
    shutil.copytree(tiny_data, run / "data")
    return run


def test_prepare_killed_at_every_call_leaves_one_version_or_the_other(raw: Path, tmp_path: Path) -> None:
    seen: list[object] = []
    assert killed_and_repeated(raw, tmp_path, prepared, every, lambda name: True, lambda copy: seen.append(pairs_of(copy / "out"))) > 5
    one, other = pairs_of(raw / "out"), pairs_of(tmp_path / "plain" / "out")
    assert one in seen and other in seen
    assert all(pair in (one, other) for pair in seen)


def pairs_of(data: Path) -> tuple[list[str], int]:
    """What loaders read of a data folder: the titles of its items, and the number of its events."""
    catalog = load_catalog(data)
    return catalog.titles, len(load_sessions(data, catalog).rows)


def test_recommend_killed_at_every_call(trained: Path, tmp_path: Path) -> None:
    assert killed_and_repeated(trained, tmp_path, COMMANDS["recommend"], every, lambda name: True) >= 2


@pytest.mark.parametrize("name", ["index", "train-sbr", "evaluate", "report"])
def test_killed_at_some_calls(trained: Path, tmp_path: Path, name: str) -> None:
    chosen = some(1.0) if name == "report" else some(0.6, 1.0) if name == "evaluate" else some(0.3, 0.9)
    assert killed_and_repeated(trained, tmp_path, COMMANDS[name], chosen, is_fixed)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_call(trained: Path, tmp_path: Path, name: str, record_property: Callable[[str, object], None]) -> None:
    record_property("kills", killed_and_repeated(trained, tmp_path, COMMANDS[name], every, is_fixed))


def is_fixed(name: str) -> bool:
    """Whether a file holds no measured time: a report has milliseconds, an evaluation the seconds of its trainings."""
    return not name.endswith("report.html") and ("evaluation" not in name or name.endswith(".parquet"))


def exported(run: Path) -> Sequence[object]:
    return "export-embeddings", "--run", run, "--data", run / "data", *(word for setting in SETTINGS for word in ("--set", setting))


def test_an_export_killed_at_some_calls(distilled: Path, tmp_path: Path) -> None:
    assert killed_and_repeated(distilled, tmp_path, exported, some(0.5, 0.93), is_fixed)


@pytest.mark.slow
def test_an_export_killed_at_every_call(distilled: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("kills", killed_and_repeated(distilled, tmp_path, exported, every, is_fixed))


@pytest.mark.slow
def test_a_distillation_killed_at_every_call(distilled: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Every call, so every checkpoint of every phase."""
    base = tmp_path / "base"
    shutil.copytree(distilled / "data", base / "data")
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    count = killed_and_repeated(
        base,
        tmp_path,
        lambda run: ("distill", "--run", run, "--data", run / "data", *words),
        every,
        lambda name: name.startswith("mllm/"),  # checkpoints hold the seconds of their training
    )
    record_property("kills", count)
