"""A disk that takes no more at some byte: exit 5 and one line, with everything as it was."""

import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import Told, tpad_here
from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.processes import FORK, contents
from pipeline.core.config_file import load_config
from recommender.training.train import train_sbr

SETTINGS = ["sbr.dim=8", "sbr.epochs=1", "sbr.models=[ID-only]", "sbr.batch=256"]
SET = [word for setting in SETTINGS for word in ("--set", setting)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("disk") / "run"
    config = load_config(None, SETTINGS)
    publish_embeddings(run, run / "data", write_data(run / "data", items=40, sessions=80), config)
    train_sbr(config, run, run / "data")
    (run / "run.json").write_text('{"data": "data"}')
    return run


COMMANDS: dict[str, Callable[[Path], Sequence[object]]] = {
    "index": lambda run: ("index", "--run", run, "--rebuild"),
    "report": lambda run: ("report", "--run", run),
    "train-sbr": lambda run: ("train-sbr", "--run", run, *SET, "--set", "sbr.lr=1e-3"),
    "recommend": lambda run: ("recommend", "--run", run, "--sessions", run / "data" / "sessions.parquet", "--out", run / "out.parquet"),
}


def _limited(words: Sequence[object], most: int, answer: Path) -> None:
    """Runs a command that may write files of at most `most` bytes, and writes how it ended."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    told = tpad_here(*words)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    answer.write_text(f"{told.code}\n{told.err}")


def limited(words: Sequence[object], most: int, answer: Path) -> Told:
    process = FORK.Process(target=_limited, args=(words, most, answer))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    code, _, err = answer.read_text().partition("\n")
    return Told(int(code), "", err, 0.0)


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_no_room_at_some_byte(run: Path, tmp_path: Path, name: str, times: int, record_property: Callable[[str, object], None]) -> None:
    """Limits from some bytes to the size of the largest file that the command writes."""
    plain = shutil.copytree(run, tmp_path / "plain")
    assert tpad_here(*COMMANDS[name](plain)).code == 0
    before, after = contents(run), contents(plain)
    largest = max((plain / file).stat().st_size for file in after if after[file] != before.get(file))
    failed = 0
    for most in np.unique(np.geomspace(64, 0.9 * largest, times + 1)[1:].astype(int)).tolist():
        copy = shutil.copytree(run, tmp_path / "copy")
        told = limited(COMMANDS[name](copy), most, tmp_path / "answer")
        assert told.is_one_line and told.code == 5, (most, told.err)
        assert "file too large" in told.err
        now = contents(copy)
        kept = [file for file in before if not file.startswith(("sbr-train/", "config.yaml", "run.json"))]
        assert {file: now.get(file) for file in kept} == {file: before[file] for file in kept}, most
        assert not [file for file in now if file.endswith(".tmp") or "staging" in file], most
        shutil.rmtree(copy)
        failed += 1
    assert failed
    record_property("full disks", failed)
