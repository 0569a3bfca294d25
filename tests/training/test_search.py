"""Tests `tpad train-sbr --search`: its best settings, resuming after a kill, and when its result is valid."""

import json
import signal
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.processes import tpad_stopped
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.errors import ENVIRONMENT, UserError
from pipeline.core.files import read_sealed
from recommender.baselines.registry import BASELINES, build_baseline
from recommender.experiments.evaluate import evaluate
from recommender.metrics.evaluator import baseline_ranks
from recommender.training.dataset import load_training_data
from recommender.training.train import train_sbr

SETTINGS = ["sbr.dim=8", "sbr.epochs=2", "sbr.batch=32", "sbr.lr=0.01", "sbr.models=[GRU4Rec, full]"]
TRIALS = 5  # one more than the pruner waits for


def settings(*more: str) -> Config:
    return load_config(None, [*SETTINGS, *more])


def start_run(run: Path) -> Path:
    torch.set_num_threads(1)
    publish_embeddings(run, run / "data", write_data(run / "data"), settings())
    return run


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = start_run(tmp_path_factory.mktemp("searched"))
    train_sbr(settings(), run, run / "data", trials=TRIALS)
    return run


def found(run: Path) -> dict[str, dict]:
    return dict(read_sealed(run / "sbr-train" / "search.json"))


def test_every_model_gets_as_many_trials_and_is_trained_with_its_best(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = found(searched)
    tuned = [name for name, baseline in BASELINES.items() if baseline.space]
    assert {name: entry["trials"] for name, entry in models.items()} == dict.fromkeys([*tuned, "GRU4Rec", "full"], TRIALS)
    assert models["STAN"]["settings"].keys() == BASELINES["STAN"].space.keys()
    assert "dropout" in models["GRU4Rec"]["settings"] and "id_dropout" in models["full"]["settings"]
    again = train_sbr(settings(), searched, searched / "data")  # without --search: what was found stays
    assert not again.made
    assert models["full"]["settings"].items() <= again.version.manifest["settings"].items()
    train_sbr(settings(), searched, searched / "data", trials=TRIALS)
    assert f"the best of {TRIALS} trials" in capsys.readouterr().out
    assert found(searched) == models


def test_the_best_is_at_least_what_the_config_s_settings_reach_on_validation(searched: Path, tmp_path: Path) -> None:
    run = start_run(tmp_path)
    train_sbr(settings(), run, run / "data", trials=1)  # the config's alone
    for name, first in found(run).items():
        assert first["settings"].items() <= (BASELINES[name].defaults if name in BASELINES else settings().sbr.model_dump()).items()
        assert found(searched)[name]["MRR@20"] >= first["MRR@20"]


def without_times(run: Path) -> dict[str, dict]:
    return {name: {key: value for key, value in entry.items() if key != "seconds"} for name, entry in found(run).items()}


def test_an_evaluation_takes_the_settings_of_a_search_and_tells_its_budget(searched: Path) -> None:
    names = ["popularity", "STAN", "GRU4Rec"]
    version, text, _ = evaluate(settings(), searched, searched / "data", "time", names)
    assert f"{TRIALS} settings tried for each: STAN, GRU4Rec. Not searched: popularity." in text
    metrics = json.loads((version.path / "metrics.json").read_bytes())
    assert metrics["search"].keys() == {"STAN", "GRU4Rec"} and metrics["speed"]["GRU4Rec"]["training seconds"] > 0
    data = load_training_data(settings("sbr.models=[ID-only]"), searched, searched / "data")
    scorer = build_baseline("STAN", data.split.train, 60, found(searched)["STAN"]["settings"])
    ranks = pq.read_table(version.path / "ranks.parquet")["STAN"].to_numpy()
    assert ranks.tolist() == baseline_ranks(scorer, data.windows(20)[2]).tolist()


def test_a_search_out_of_time_keeps_what_it_has(tmp_path: Path) -> None:
    """Each model has its first trial, and none begins a second."""
    run = start_run(tmp_path)
    train_sbr(settings("sbr.models=[ID-only]"), run, run / "data", trials=TRIALS, minutes=1e-6)
    assert {entry["trials"] for entry in found(run).values()} == {1}
    assert {entry["minutes"] for entry in found(run).values()} == {1e-6}


def kill_at(run: Path, trials: int, said: str, times: int = 1) -> None:
    """Kills a search in a separate process once that many lines on stderr begin so."""
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    command = "train-sbr", "--run", run, "--data", run / "data", "--search", trials, *words
    done = tpad_stopped(signal.SIGKILL, lambda err: sum(line.startswith(said) for line in err.splitlines()) >= times, *command)
    assert done.returncode == -signal.SIGKILL


def test_a_search_killed_and_one_added_to_a_killed_training_end_like_an_undisturbed_one(searched: Path, tmp_path: Path) -> None:
    run = start_run(tmp_path)
    kill_at(run, 1, "GRU4Rec (seed 0)", times=2)  # after the trial, and after the training that follows a smaller search
    assert list((run / "sbr-train" / "checkpoints" / "GRU4Rec-0").glob("step-*"))
    kill_at(run, TRIALS, "GRU4Rec: trial 4")
    train_sbr(settings(), run, run / "data", trials=TRIALS)
    assert without_times(run) == without_times(searched)
    names = [json.loads((folder / "sbr" / "current").read_text())["version"] for folder in (run, searched)]
    one, two = ((folder / "sbr" / name / "model.safetensors").read_bytes() for folder, name in zip((run, searched), names, strict=True))
    assert one == two
    assert not (run / "sbr-train" / "trials").exists()


def test_settings_of_a_search_for_another_config_are_ignored(searched: Path) -> None:
    other = train_sbr(settings("sbr.lr=0.02", "sbr.epochs=1"), searched, searched / "data")
    assert other.made and other.version.manifest["settings"]["lr"] == 0.02


def test_without_optuna_it_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install '\.\[search\]'") as error:
        train_sbr(settings(), tmp_path, tmp_path, trials=1)
    assert error.value.code == ENVIRONMENT
