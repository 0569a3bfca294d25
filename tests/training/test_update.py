"""Tests `tpad train-sbr --update`: the published model learns the new sessions of the log, unless that makes it worse."""

import json
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_train_sbr import weights
from typer.testing import CliRunner

import cli
from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.processes import contents, tpad_stopped
from pipeline.core.artifact import open_verified
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.errors import ARTIFACT, USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.session_log import load_sessions
from recommender.serving.recommender import Recommender
from recommender.training.train import train_sbr
from recommender.training.update import update_sbr

SETTINGS = ["sbr.dim=8", "sbr.epochs=4", "sbr.batch=32", "sbr.lr=0.01", "sbr.models=[full]"]
OLD = 320  # sessions before the night; none has one of the eight cold items


def settings(*more: str) -> Config:
    return load_config(None, [*SETTINGS, *more])


def write_log(run: Path, sessions: dict[str, list[str]]) -> None:
    """Sessions in order of time."""
    events = [
        (name, item, 1_600_000_000 + s * 1000 + n) for s, (name, items) in enumerate(sessions.items()) for n, item in enumerate(items)
    ]
    table = pa.table(dict(zip(("session_id", "item_id", "timestamp"), zip(*events, strict=True), strict=True)))
    pq.write_table(table, run / "data" / "sessions.parquet")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The items of 400 sessions; the last 80 are new later."""
    data = tmp_path_factory.mktemp("whole") / "data"
    write_data(data)
    found: dict[str, list[str]] = {}
    for event in pq.read_table(data / "sessions.parquet").to_pylist():
        found.setdefault(event["session_id"], []).append(event["item_id"])
    return found


@pytest.fixture(scope="module")
def trained(every: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    group = write_data(run / "data")
    write_log(run, dict(list(every.items())[:OLD]))
    publish_embeddings(run, run / "data", group, settings())
    train_sbr(settings(), run, run / "data")
    return run


def next_day(trained: Path, to: Path, sessions: dict[str, list[str]]) -> Path:
    """A copy of the run whose log is now these sessions."""
    run = Path(shutil.copytree(trained, to))
    write_log(run, sessions)
    return run


@pytest.fixture(scope="module")
def updated(trained: Path, every: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = next_day(trained, tmp_path_factory.mktemp("updated") / "run", every)
    done = update_sbr(settings(), run, run / "data")
    assert (done.sessions, done.version.name) == (72, "v0002"), done.told
    assert "MRR@20 on the newest 8 sessions" in done.told
    return run


def manifest(run: Path) -> dict[str, Any]:
    return open_verified(run / "sbr", "sbr", "").manifest


def test_the_new_sessions_are_counted_and_their_new_items_known(trained: Path, updated: Path) -> None:
    log = load_sessions(updated / "data", load_catalog(updated / "data"))
    learned = log.select(np.arange(OLD + 72))  # the newest tenth is held back
    counts = np.bincount(learned.rows, minlength=60)
    assert pq.read_table(updated / "sbr" / "v0002" / "items.parquet")["count"].to_pylist() == counts.tolist()
    before, after = weights(trained), weights(updated)
    assert not before["known"][52:].any() and after["known"].tolist() == (counts > 0).tolist() and after["known"][52:].sum() > 5
    pairs = {(a, b) for session in map(learned.session, range(len(learned))) for a, b in pairwise(session)}
    assert after["pairs.next_item_counts.keys"].tolist() == sorted(int(a) * 60 + int(b) for a, b in pairs)
    assert int(after["pairs.next_item_counts.counts"].sum()) == len(learned.rows) - len(learned)
    facts = manifest(updated)
    assert facts["updates"] == 1 and facts["newest_session"] == [learned.start.max(), learned.session_ids[-1]]
    for key in ("figures_of", "refit", "settings", "embeddings_manifest_sha256"):
        assert facts[key] == manifest(trained)[key]
    assert (updated / "sbr" / "v0002" / "metrics.json").read_bytes() == (trained / "sbr" / "v0001" / "metrics.json").read_bytes()
    assert not list((updated / "sbr-train" / "checkpoints").glob("*"))


def test_calibration_stays_and_the_rest_moves(trained: Path, updated: Path) -> None:
    before, after = weights(trained), weights(updated)
    assert before.keys() == after.keys()
    for name in ("repeat_weights", "cold_weights"):
        assert torch.equal(before[name], after[name]), name
    for name in ("ids.weight", "project.weight", "popularity_weight"):
        assert not torch.equal(before[name], after[name]), name


def test_new_items_are_recommended_by_what_followed_them(updated: Path, trained: Path) -> None:
    def place(run: Path, item: str, follower: str) -> int:
        return [ranked.item_id for ranked in Recommender.load(run).recommend([item], 60).items].index(follower)

    log = load_sessions(updated / "data", load_catalog(updated / "data")).select(np.arange(OLD + 72))
    inside = np.ones(len(log.rows) - 1, bool)
    inside[log.offsets[1:-1] - 1] = False
    pairs = [(f"item-{a:03d}", f"item-{b:03d}") for a, b in zip(log.rows[:-1][inside], log.rows[1:][inside], strict=True) if b >= 52]
    now, then = (np.mean([place(run, *pair) for pair in pairs]) for run in (updated, trained))
    assert now < then


def test_the_same_update_twice_gives_the_same_bytes(updated: Path, trained: Path, every: dict[str, list[str]], tmp_path: Path) -> None:
    run = next_day(trained, tmp_path / "run", every)
    update_sbr(settings(), run, run / "data")
    assert contents(run / "sbr" / "v0002") == contents(updated / "sbr" / "v0002") | {
        "manifest.json": contents(run / "sbr" / "v0002")["manifest.json"]
    }


def test_the_next_update_learns_the_held_back_sessions(updated: Path, every: dict[str, list[str]], tmp_path: Path) -> None:
    run = Path(shutil.copytree(updated, tmp_path / "run"))
    done = update_sbr(settings(), run, run / "data")
    assert (done.sessions, done.version.name) == (0, "v0002")
    assert done.told == "8 new sessions, fewer than 10: nothing to learn yet"
    write_log(run, every | {f"t{n}": ["item-052", "item-059", "item-053"] for n in range(12)})
    done = update_sbr(settings(), run, run / "data")
    assert (done.sessions, done.version.name) == (18, "v0003"), done.told  # of 20, a tenth held back
    assert manifest(run)["updates"] == 2
    counts = pq.read_table(run / "sbr" / "v0003" / "items.parquet")["count"].to_pylist()
    all_counts = np.bincount(load_sessions(run / "data", load_catalog(run / "data")).select(np.arange(410)).rows, minlength=60)
    assert counts == all_counts.tolist()


def test_fewer_than_ten_new_sessions_change_nothing(trained: Path, every: dict[str, list[str]], tmp_path: Path) -> None:
    run = next_day(trained, tmp_path / "run", dict(list(every.items())[: OLD + 9]))
    before = contents(run / "sbr")
    done = update_sbr(settings(), run, run / "data")
    assert (done.sessions, done.version.name) == (0, "v0001") and done.told.startswith("9 new sessions")
    assert contents(run / "sbr") == before


def test_a_worse_update_is_not_published(trained: Path, every: dict[str, list[str]], tmp_path: Path) -> None:
    """A night of robot traffic: hundreds of transitions that never occur; the newest sessions are of visitors again."""
    old = dict(list(every.items())[:OLD])
    robot = {f"robot{n}": [f"item-{(7 * n) % 52:03d}", f"item-{(7 * n) % 52:03d}"] * 4 for n in range(360)}
    visitors = {f"visitor{n}": items for n, items in enumerate(list(old.values())[-40:])}
    run = next_day(trained, tmp_path / "run", old | robot | visitors)
    before = contents(run / "sbr")
    done = update_sbr(settings("sbr.lr=0.05"), run, run / "data")
    assert (done.sessions, done.version.name) == (0, "v0001"), done.told
    assert "not published, as the update is worse: MRR@20 on the newest 40 sessions" in done.told and "tpad train-sbr" in done.told
    assert contents(run / "sbr") == before
    assert not list((run / "sbr-train" / "checkpoints").glob("*"))


def test_a_run_that_cannot_be_updated_is_refused(trained: Path, tmp_path: Path) -> None:
    words = ["train-sbr", "--run", str(trained), "--data", str(trained / "data"), "--update"]
    for more in (["--fresh"], ["--search", "2"]):
        done = CliRunner().invoke(cli.app, [*words, *more])
        assert done.exit_code == USAGE and done.stderr.startswith("error: --update goes on from the published model")
    shutil.copytree(trained / "data", tmp_path / "data")
    with pytest.raises(UserError, match="tpad train-sbr") as error:
        update_sbr(settings(), tmp_path, tmp_path / "data")
    assert error.value.code == ARTIFACT
    ids_only = settings("sbr.models=[ID-only]", "sbr.epochs=1", "sbr.refit=false")
    train_sbr(ids_only, tmp_path, tmp_path / "data")
    with pytest.raises(UserError, match=r"was not trained on all sessions .*sbr\.refit=true") as error:
        update_sbr(ids_only, tmp_path, tmp_path / "data")
    assert error.value.code == ARTIFACT and "\n" not in str(error.value)


def test_the_command_updates_a_model_of_ids_alone(every: dict[str, list[str]], tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    write_log(tmp_path, dict(list(every.items())[:OLD]))
    words = ["--run", str(tmp_path), "--data", str(tmp_path / "data")]
    words += [word for setting in ("sbr.models=[ID-only]", "sbr.dim=8", "sbr.epochs=1") for word in ("--set", setting)]
    assert CliRunner().invoke(cli.app, ["train-sbr", *words]).exit_code == 0
    write_log(tmp_path, every)
    done = CliRunner().invoke(cli.app, ["train-sbr", "--update", "--run", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "on the newest 8 sessions" in done.stderr and "72 sessions learned" in done.stderr
    assert weights(tmp_path)["known"][52:].sum() > 5
    assert CliRunner().invoke(cli.app, ["recommend", "--run", str(tmp_path), "--session", "item-059"]).exit_code == 0
    assert "up to date" in CliRunner().invoke(cli.app, ["index", "--run", str(tmp_path)]).stderr


def test_a_stopped_update_goes_on_to_the_same_bytes(trained: Path, every: dict[str, list[str]], tmp_path: Path) -> None:
    whole, stopped = (next_day(trained, tmp_path / name, every) for name in ("whole", "stopped"))
    more = "sbr.batch=4"  # steps enough to be stopped between two
    update_sbr(settings(more), whole, whole / "data")
    log = stopped / "sbr-train" / "metrics.jsonl"
    words = [word for setting in (*SETTINGS, more) for word in ("--set", setting)]
    command = "train-sbr", "--update", "--run", stopped, "--data", stopped / "data", *words
    assert tpad_stopped(signal.SIGTERM, lambda said: '"update"' in log.read_text(), *command).returncode == 143
    (checkpoint,) = (stopped / "sbr-train" / "checkpoints" / "update").glob("step-*")
    assert 0 < int(checkpoint.name.removeprefix("step-")) < 180
    assert json.loads((stopped / "sbr" / "current").read_bytes())["version"] == "v0001"
    assert update_sbr(settings(more), stopped, stopped / "data").sessions == 72
    one, other = contents(whole / "sbr" / "v0002"), contents(stopped / "sbr" / "v0002")
    assert {name for name in one if one[name] != other[name]} <= {"manifest.json"}
