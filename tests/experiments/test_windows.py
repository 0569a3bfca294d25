"""Tests `tpad evaluate --windows N`: cut-off times inside the log, means and spread over them."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import cli
from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.session_logs import log_of
from pipeline.core.config import Config, DataConfig
from pipeline.core.config_file import load_config
from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.split import split_sessions, split_window
from recommender.experiments.evaluate import evaluate
from recommender.experiments.rolling import evaluate_windows

SETTINGS = ["sbr.dim=8", "sbr.epochs=1", "sbr.batch=64", "sbr.lr=0.01"]


def settings(*more: str) -> Config:
    return load_config(None, [*SETTINGS, *more])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    publish_embeddings(run, run / "data", write_data(run / "data"), settings())
    return run


def tpad(run: Path, *words: str) -> Any:
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    return CliRunner().invoke(cli.app, ["evaluate", "--run", str(run), "--data", str(run / "data"), *options, *words])


@pytest.fixture(scope="module")
def evaluated(run: Path) -> tuple[Path, str]:
    done = tpad(run, "--windows", "3", "--models", "popularity,ID-only")
    assert done.exit_code == 0, done.output
    return run / "evaluation" / "windows-3" / "v0001", done.stdout


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_windows_follow_each_other_over_the_held_out_sessions(count: int) -> None:
    log, data = log_of(200), DataConfig(valid=0.15, test=0.1)
    ordinary, windows = split_sessions(log, data), [split_window(log, data, number, count) for number in range(count)]
    assert windows[0].train.session_ids == ordinary.train.session_ids
    held: list[str] = [*windows[0].valid.session_ids]
    for before, window in zip([None, *windows], windows, strict=False):
        assert window.train.start.max() < window.valid.start.min() and window.valid.start.max() < window.test.start.min()
        assert window.train.session_ids + window.valid.session_ids == log.session_ids[: len(window.train) + len(window.valid)]
        assert before is None or before.test.session_ids == window.valid.session_ids
        held += window.test.session_ids
    assert held == ordinary.valid.session_ids + ordinary.test.session_ids == log.session_ids[150:]
    lengths = [len(part) for window in windows for part in (window.valid, window.test)]
    assert max(lengths) - min(lengths) <= 1


def test_more_windows_than_held_out_sessions_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be split") as error:
        split_window(log_of(20), DataConfig(), 0, 5)
    assert error.value.code == DATA


def cells(report: str, heading: str) -> dict[str, list[str]]:
    lines = report.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    return {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| "))}


def test_means_and_spread_are_those_of_the_windows(evaluated: tuple[Path, str]) -> None:
    version, printed = evaluated
    metrics, report = json.loads((version / "metrics.json").read_bytes()), (version / "report.md").read_text()
    assert report.startswith("# Evaluation over 3 windows of time") and "| ID-only | " in printed
    assert [[window[f"{part}_sessions"] for part in ("train", "valid", "test")] for window in metrics["windows"]] == [
        [320, 20, 20],
        [340, 20, 20],
        [360, 20, 20],
    ]
    table = cells(report, "All cases")
    for name in ("popularity", "ID-only"):
        windows = metrics["by_window"][name]
        assert len(windows) == 3
        for place, metric in enumerate(table[""]):
            values = [window["all"][metric] for window in windows]
            mean, deviation = sum(values) / 3, np.std(values, ddof=1)
            assert metrics["results"][name]["mean"]["all"][metric] == pytest.approx(mean)
            assert metrics["results"][name]["std"]["all"][metric] == pytest.approx(deviation)
            assert table[name][place] == f"{mean:.4f} ± {deviation:.4f}"
        for metric in ("HR@20", "MRR@20"):
            assert cells(report, f"{metric} by window")[name] == [f"{window['all'][metric]:.4f}" for window in windows]
    of = metrics["by_window"]
    gap = [p["all"]["MRR@20"] - i["all"]["MRR@20"] for p, i in zip(of["popularity"], of["ID-only"], strict=True)]
    error = np.std(gap, ddof=1) / 3**0.5
    row = cells(report, "Differences to ID-only")["popularity"]
    assert f"{np.mean(gap):+.4f} ± {error:.4f} ({sum(g > 0 for g in gap)} of 3)" in row


def test_the_figures_of_a_window_are_those_of_a_log_that_ends_with_it(run: Path, evaluated: tuple[Path, str], tmp_path: Path) -> None:
    """The last window of three has the sizes of an ordinary split of 400 sessions: 360 training, 20 validation, 20 test."""
    figures = json.loads((evaluated[0] / "metrics.json").read_bytes())["by_window"]
    config = settings("data.valid=0.05", "data.test=0.05")
    version, _, _ = evaluate(config, tmp_path, run / "data", "time", ["popularity", "ID-only"])
    ordinary = json.loads((version.path / "metrics.json").read_bytes())["results"]
    for name, windows in figures.items():
        assert windows[2]["all"] == ordinary[name]["mean"]["all"], name


def test_a_finished_evaluation_is_not_repeated(run: Path, evaluated: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    before = (evaluated[0] / "metrics.json").read_bytes()
    version, report, _ = evaluate_windows(settings(), run, run / "data", 3, ["popularity", "ID-only"], None)
    assert version.name == "v0001" and report == (evaluated[0] / "report.md").read_text()
    stored = [run / "evaluation-train" / "windows-3" / str(n) / "ID-only-0.json" for n in range(3)]
    written = [path.stat().st_mtime_ns for path in stored]
    stored[1].unlink()  # as if it had been stopped there
    version, _, _ = evaluate_windows(settings(), run, run / "data", 3, ["popularity", "S-POP", "ID-only"], None)
    assert capsys.readouterr().err.count("ID-only (seed 0)") == 1
    assert [path.stat().st_mtime_ns == time for path, time in zip(stored, written, strict=True)] == [True, False, True]
    again = json.loads((version.path / "metrics.json").read_bytes())
    assert again["by_window"]["ID-only"] == json.loads(before)["by_window"]["ID-only"]


def test_a_bucket_that_a_window_lacks_is_averaged_over_the_others(tmp_path: Path) -> None:
    """There are cold targets in the second window only."""
    write_data(tmp_path / "data", cold=0)
    log = pq.read_table(tmp_path / "data" / "sessions.parquet").to_pylist()
    for event in log:
        event["item_id"] = event["item_id"].replace("059", "053")
    for number in (366, 370):  # sessions of the test of the second window
        log.append({"session_id": f"s{number:04d}", "item_id": "item-059", "timestamp": 1_600_000_000 + number * 1000 + 500})
    pq.write_table(pa.Table.from_pylist(log), tmp_path / "data" / "sessions.parquet")
    version, report, _ = evaluate_windows(settings(), tmp_path, tmp_path / "data", 3, ["popularity", "ID-only"], None)
    metrics = json.loads((version.path / "metrics.json").read_bytes())
    cases = [window["cold"]["cases"] for window in metrics["by_window"]["ID-only"]]
    assert cases == [0, 2, 0]
    mean, deviation = (metrics["results"]["ID-only"][statistic]["cold"] for statistic in ("mean", "std"))
    assert mean["HR@20"] == metrics["by_window"]["ID-only"][1]["cold"]["HR@20"] and deviation["HR@20"] == 0
    assert mean["cases"] == pytest.approx(2 / 3)
    assert re.search(r"\| ID-only \| 0\.\d{4} ± ", report)


def test_only_the_protocol_of_time_has_windows(run: Path) -> None:
    for words, said in (
        (["--protocol", "user-hash"], r"--windows cuts the log by time \(--protocol user-hash\)"),
        (["--protocol", "paper-max"], r"--windows cuts the log by time \(--protocol paper-max\)"),
        (["--set", "data.protocol=user-hash"], r"--windows cuts the log by time .*user-hash"),
    ):
        done = tpad(run, "--windows", "2", *words)
        assert done.exit_code == USAGE and re.match(rf"error: {said}", done.stderr) and done.stderr.count("\n") == 1
    with pytest.raises(UserError, match=r"data\.protocol = user-hash") as error:
        evaluate_windows(settings("data.protocol=user-hash"), run, run / "data", 2, ["popularity"], None)
    assert error.value.code == USAGE
