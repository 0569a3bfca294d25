"""Tests `train_sbr` on a small run: results, files, refusals, and that a killed run resumes."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from helpers.fake_embeddings import DIM, GROUPS, publish_embeddings, write_data
from helpers.processes import tpad_stopped, two_processes
from pipeline.core.artifact import locked
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.errors import ARTIFACT, USAGE, UserError
from recommender.baselines.registry import ENCODERS
from recommender.retrieval.saved_model import load_model
from recommender.serving.recommender import Recommender
from recommender.training.train import train_sbr

SETTINGS = ["sbr.dim=16", "sbr.epochs=6", "sbr.batch=32", "sbr.lr=0.01", "sbr.models=[SASRec, ID-only, content-only, full]"]


def settings(*more: str) -> Config:
    return load_config(None, [*SETTINGS, *more])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    publish_embeddings(run, run / "data", write_data(run / "data"), settings())
    train_sbr(settings(), run, run / "data")
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    version = json.loads((run / "sbr" / "current").read_text())["version"]
    return load_file(run / "sbr" / version / "model.safetensors")


def found_by_full(run: Path) -> dict[str, dict[str, float]]:
    """bucket -> metric -> value, of a run that is trained already"""
    summary = train_sbr(settings(), run, run / "data")
    assert not summary.made
    return dict(summary.metrics["results"]["full"]["mean"])


def copy_inputs(run: Path, to: Path) -> Path:
    shutil.copytree(run / "data", to / "data")
    shutil.copytree(run / "embeddings", to / "embeddings")
    return to


def test_the_table_has_every_model_and_the_full_one_is_not_below_its_halves(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = train_sbr(settings(), trained, trained / "data")
    assert not summary.made  # up to date
    printed = capsys.readouterr().out
    for name in ("popularity", "S-POP", "last-item repeat", "co-occurrence", "SKNN", "VSKNN", "SASRec", "ID-only", "content-only", "full"):
        assert name in printed
    assert "ceiling" not in printed
    assert "40 validation, 40 test" in printed
    mean = {name: result["mean"] for name, result in summary.metrics["results"].items()}
    cases = mean["full"]["all"]["cases"]
    assert mean["full"]["warm"]["cases"] + mean["full"]["cold"]["cases"] == cases == mean["popularity"]["all"]["cases"]
    for half in ("ID-only", "content-only"):
        assert mean["full"]["all"]["HR@10"] > mean[half]["all"]["HR@10"]
    assert mean["full"]["cold"]["HR@20"] > 0.5
    assert mean["ID-only"]["cold"]["HR@20"] < 0.1


def test_weights_of_uninformative_dimensions_decay(tmp_path: Path) -> None:
    group = write_data(tmp_path / "data")
    rng = np.random.default_rng(0)
    telling = np.eye(GROUPS)[group] @ rng.normal(size=(GROUPS, DIM)) + 0.2 * rng.normal(size=(len(group), DIM))
    halves = np.stack([telling, rng.normal(size=telling.shape)]).astype(np.float32)

    def share_of_noise(decay: float) -> float:
        """The content projection."""
        run, config = tmp_path / str(decay), settings("sbr.models=[full]", f"sbr.content_decay={decay}", "sbr.refit=false")
        publish_embeddings(run, tmp_path / "data", group, config, halves=halves)
        train_sbr(config, run, tmp_path / "data")
        size = weights(run)["project.weight"].square().sum(0)
        return float(size[DIM:].sum() / size.sum())

    assert share_of_noise(20.0) < share_of_noise(0.0) / 2


def test_one_line_of_metrics_per_step(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "sbr-train" / "metrics.jsonl").read_text().splitlines()]
    for model in ("ID-only", "content-only", "full"):
        steps = [line["step"] for line in lines if line["model"] == model]
        assert steps == list(range(len(steps)))
        assert len(steps) % 10 == 0  # whole epochs of 320 sessions in batches of 32
        losses = [line["loss"] for line in lines if line["model"] == model]
        assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_the_ceiling_is_shown_only_for_the_split_it_is_of(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_inputs(trained, tmp_path)
    ceiling = {"valid": 0.1, "test": 0.1, "max_prefix": 20, "metrics": {"all": {"HR@10": 0.4321}, "warm": {}, "cold": {}}}
    for valid, shown in ((0.1, True), (0.2, False)):
        (run / "data" / "ceiling.json").write_text(json.dumps(ceiling | {"valid": valid}))
        train_sbr(settings("sbr.epochs=1"), run, run / "data", fresh=True)
        assert ("0.4321" in capsys.readouterr().out) == shown


def test_seeds_give_mean_and_deviation(trained: Path, tmp_path: Path) -> None:
    run = copy_inputs(trained, tmp_path)
    results = train_sbr(settings("sbr.epochs=1", "sbr.seeds=2"), run, run / "data").metrics["results"]
    assert results["full"]["seeds"] == 2
    assert results["full"]["std"]["all"]["MRR@20"] > 0
    assert results["popularity"]["seeds"] == 1


@pytest.mark.parametrize("entry", ["catalogue_sha256", "sessions_sha256"])
def test_embeddings_of_other_inputs_are_refused(tmp_path: Path, entry: str) -> None:
    publish_embeddings(tmp_path, tmp_path / "data", write_data(tmp_path / "data"), settings(), **{entry: "0" * 64})
    with pytest.raises(UserError, match="embeddings") as error:
        train_sbr(settings(), tmp_path, tmp_path / "data")
    assert error.value.code == ARTIFACT
    assert not (tmp_path / "sbr").exists()


def test_no_embeddings_is_one_clear_line(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    with pytest.raises(UserError, match="tpad export-embeddings") as error:
        train_sbr(settings(), tmp_path, tmp_path / "data")
    assert error.value.code == ARTIFACT


def test_a_loss_that_is_not_finite_is_one_clear_line(trained: Path, tmp_path: Path) -> None:
    run = copy_inputs(trained, tmp_path)
    with pytest.raises(UserError, match=r"loss is nan \([\w -]+, step \d of epoch 0\); lower sbr\.lr") as error:
        train_sbr(settings("sbr.lr=1e30"), run, run / "data")
    assert error.value.code == USAGE
    assert not (run / "sbr" / "current").exists()


def trained_until(by: signal.Signals, reached: Callable[[], object], run: Path, *more: str) -> int | None:
    """Trains in a process of its own, which gets the signal as soon as `reached` holds. Returns its exit code."""
    words = [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]
    return tpad_stopped(by, lambda said: reached(), "train-sbr", "--run", run, "--data", run / "data", *words).returncode


def kill_in(run: Path, model: str) -> None:
    """Trains in a separate process, which is killed as soon as this model has a checkpoint."""
    checkpoints = run / "sbr-train" / "checkpoints" / f"{model}-0"
    assert trained_until(signal.SIGKILL, lambda: list(checkpoints.glob("step-*/state.json")), run) == -signal.SIGKILL
    assert not (run / "sbr" / "current").exists()


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(trained: Path, tmp_path: Path) -> None:
    run = copy_inputs(trained, tmp_path)
    for model in ("SASRec", "full"):
        kill_in(run, model)
    train_sbr(settings(), run, run / "data")
    undisturbed, resumed = weights(trained), weights(run)  # of full; the ranks are those of all models
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    for file in ("sbr-train/metrics.jsonl", "sbr/v0001/ranks.parquet"):
        assert (run / file).read_bytes() == (trained / file).read_bytes()


def test_a_killed_run_goes_on_with_other_models_or_other_settings(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = copy_inputs(trained, tmp_path / "run"), tmp_path / "other"
    kill_in(run, "content-only")
    shutil.copytree(run, other)
    log = run / "sbr-train" / "metrics.jsonl"
    marked = log.read_text().replace('"loss": ', '"loss": 9', 1)
    log.write_text(marked)  # a line of SASRec, which comes first; whatever is trained again is logged again
    train_sbr(settings("sbr.models=[SASRec, full]"), run, run / "data")
    assert "trained anew" not in capsys.readouterr().err
    assert log.read_text().startswith(marked.splitlines()[0])
    assert all(torch.equal(weight, weights(trained)[name]) for name, weight in weights(run).items())
    ranks, undisturbed = (pq.read_table(folder / "sbr" / "v0001" / "ranks.parquet") for folder in (run, trained))
    assert ranks.equals(undisturbed.select(ranks.column_names))
    more = ["sbr.models=[SASRec, full]", "sbr.epochs=1", "sbr.lr=0.02"]
    train_sbr(settings(*more), other, other / "data")
    assert [line for line in capsys.readouterr().err.splitlines() if "trained anew" in line] == [
        "note: SASRec (seed 0) is trained anew: its checkpoint is of other settings or data, and dropped"
    ]
    train_sbr(settings(*more), (fresh := copy_inputs(trained, tmp_path / "fresh")), fresh / "data")
    assert (other / "sbr" / "v0001" / "ranks.parquet").read_bytes() == (fresh / "sbr" / "v0001" / "ranks.parquet").read_bytes()


def test_sigterm_in_the_middle_of_an_epoch_loses_no_step(trained: Path, tmp_path: Path) -> None:
    more = ["sbr.models=[full]", "sbr.epochs=2", "sbr.batch=4"]
    whole, stopped = copy_inputs(trained, tmp_path / "whole"), copy_inputs(trained, tmp_path / "stopped")
    train_sbr(settings(*more), whole, whole / "data")
    log = stopped / "sbr-train" / "metrics.jsonl"
    assert trained_until(signal.SIGTERM, lambda: log.exists() and log.stat().st_size, stopped, *more) == 143
    (checkpoint,) = (stopped / "sbr-train" / "checkpoints" / "full-0").iterdir()
    assert 0 < int(checkpoint.name.removeprefix("step-")) < 80  # of the first epoch
    train_sbr(settings(*more), stopped, stopped / "data")
    one, two = weights(whole), weights(stopped)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert log.read_text() == (whole / "sbr-train" / "metrics.jsonl").read_text()


def test_two_trainings_at_once_in_one_run_are_refused(trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    with locked(run / "sbr-train"), pytest.raises(UserError, match="another tpad is writing here") as error:
        train_sbr(settings("sbr.dim=24"), run, run / "data")
    assert error.value.code == ARTIFACT


def test_a_model_learns_with_gbce(trained: Path, tmp_path: Path) -> None:
    run = copy_inputs(trained, tmp_path)
    more = ["sbr.models=[SASRec, full]", "sbr.loss=gbce", "sbr.negatives=20"]
    figures = {
        name: result["mean"]["all"]["HR@10"] for name, result in train_sbr(settings(*more), run, run / "data").metrics["results"].items()
    }
    assert min(figures["SASRec"], figures["full"]) > figures["popularity"] + 0.2


def test_bfloat16_learns_as_much(trained: Path, tmp_path: Path) -> None:
    run = copy_inputs(trained, tmp_path)
    figures = train_sbr(settings("sbr.models=[full]", "sbr.precision=bf16"), run, run / "data").metrics["results"]["full"]["mean"]["all"]
    exact = found_by_full(trained)["all"]
    assert figures != exact and abs(figures["HR@10"] - exact["HR@10"]) < 0.05
    assert {tensor.dtype for name, tensor in weights(run).items() if "weight" in name} == {torch.float32}


@pytest.mark.parametrize("encoder", list(ENCODERS))
def test_every_encoder_learns_in_bfloat16(trained: Path, tmp_path: Path, encoder: str) -> None:
    run = copy_inputs(trained, tmp_path)
    more = [f"sbr.models=[{encoder}, ID-only]", "sbr.precision=bf16", "sbr.epochs=4"]
    by_model = train_sbr(settings(*more), run, run / "data").metrics["results"]
    assert by_model[encoder]["mean"]["all"]["HR@20"] > by_model["popularity"]["mean"]["all"]["HR@20"] + 0.05


def test_a_model_of_ids_is_published_beside_one_that_reads_vectors(trained: Path, tmp_path: Path) -> None:
    run = copy_inputs(trained, tmp_path)
    summary = train_sbr(settings("sbr.models=[ID-only, content-only]", "sbr.epochs=1"), run, run / "data")
    assert summary.version.manifest["embeddings_manifest_sha256"] is None
    recommender = Recommender.load(run)
    assert len(recommender.recommend(recommender.item_ids[:2], k=5).items) == 5


def test_a_model_of_an_older_format_is_one_clear_line(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(trained / "sbr" / "v0001", folder)
    config = json.loads((folder / "config.json").read_bytes())
    config["form"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="run `tpad train-sbr`") as error:
        load_model(folder)
    assert error.value.code == ARTIFACT


def test_two_processes_take_the_steps_of_one(trained: Path, tmp_path: Path) -> None:
    run = copy_inputs(trained, tmp_path)
    two_processes(train_sbr, settings(), run, run / "data")
    losses = {}
    for name, folder in (("one", trained), ("two", run)):
        lines = [json.loads(line) for line in (folder / "sbr-train" / "metrics.jsonl").read_text().splitlines()]
        shared = [line for line in lines if line["step"] < 20 and line["model"] != "SASRec"]  # whose dropout each process draws for itself
        losses[name] = {(line["model"], line["step"]): line["loss"] for line in shared}
    assert losses["one"].keys() == losses["two"].keys()
    assert all(abs(losses["one"][key] - losses["two"][key]) < 1e-3 for key in losses["one"])
    one, two = found_by_full(trained), found_by_full(run)
    assert all(abs(one[bucket][metric] - two[bucket][metric]) < 1e-3 for bucket in one for metric in one[bucket])


def test_only_the_models_asked_for_are_trained_and_each_rank_is_published(trained: Path, tmp_path: Path) -> None:
    run = copy_inputs(trained, tmp_path)
    summary = train_sbr(settings("sbr.epochs=1", "sbr.models=[full]"), run, run / "data")
    assert "full" in summary.metrics["results"] and not {"ID-only", "content-only"} & summary.metrics["results"].keys()
    assert pq.read_schema(summary.version.path / "ranks.parquet").names == ["session_id", "position", "item_id", "full"]
    published = train_sbr(settings(), trained, trained / "data")
    ranks = pq.read_table(published.version.path / "ranks.parquet").to_pylist()
    log = pq.read_table(trained / "data" / "sessions.parquet").to_pylist()
    sessions = {line["session_id"]: [event["item_id"] for event in log if event["session_id"] == line["session_id"]] for line in ranks}
    cases = [(name, n, item) for name, items in sessions.items() for n, item in enumerate(items) if n]
    assert [(line["session_id"], line["position"], line["item_id"]) for line in ranks] == cases
    for name, result in published.metrics["results"].items():
        if name in ("SASRec", "ID-only", "content-only", "full"):
            assert np.mean([line[name] <= 10 for line in ranks]) == pytest.approx(result["mean"]["all"]["HR@10"])


def test_an_unknown_model_is_one_clear_line(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SASREC.*SASRec on vectors") as error:
        train_sbr(settings("sbr.models=[SASREC, full]"), copy_inputs(trained, tmp_path), trained / "data")
    assert error.value.code == USAGE
