"""Tests `sbr.refit` and `distill.refit`: the published model is trained on all sessions, its figures are not; killed runs resume."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_train_sbr import copy_inputs, weights
from typer.testing import CliRunner

import cli
from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.processes import tpad_stopped
from helpers.runs import SETTINGS as DISTILLING
from helpers.server import serving
from pipeline.core.artifact import open_verified
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.data.session_log import load_sessions
from pipeline.data.split import split_sessions
from recommender.serving.recommender import Recommender
from recommender.training.teacher import Teacher
from recommender.training.train import train_sbr

SETTINGS = ["sbr.dim=8", "sbr.epochs=3", "sbr.batch=16", "sbr.lr=0.01", "sbr.models=[ID-only, full]"]


def settings(*more: str) -> Config:
    return load_config(None, [*SETTINGS, *more])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def refitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    publish_embeddings(run, run / "data", write_data(run / "data"), settings())
    train_sbr(settings(), run, run / "data")
    (run / "run.json").write_text('{"data": "data"}')
    return run


@pytest.fixture(scope="module")
def held_out(refitted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = copy_inputs(refitted, tmp_path_factory.mktemp("other"))
    train_sbr(settings("sbr.refit=false"), run, run / "data")
    return run


def manifest(run: Path) -> dict[str, object]:
    return open_verified(run / "sbr", "sbr", "").manifest


def test_the_published_model_knows_all_sessions(refitted: Path, held_out: Path) -> None:
    log = load_sessions(refitted / "data", load_catalog(refitted / "data"))
    train = split_sessions(log, settings().data).train
    for run, seen in ((refitted, log), (held_out, train)):
        counts = np.bincount(seen.rows, minlength=60)
        assert pq.read_table(run / "sbr" / "v0001" / "items.parquet")["count"].to_pylist() == counts.tolist()
        assert weights(run)["known"].tolist() == (counts > 0).tolist()
        assert manifest(run)["sessions_sha256"] == seen.ids_sha256() and manifest(run)["newest_session"][0] == seen.start.max()
    newest = [row for row in range(60) if row in log.rows and row not in train.rows]
    assert newest and weights(refitted)["known"][newest].all() and not weights(held_out)["known"][newest].any()


def test_its_figures_are_those_of_the_held_out_twin(refitted: Path, held_out: Path) -> None:
    ours, theirs = (json.loads((run / "sbr" / "v0001" / "metrics.json").read_bytes()) for run in (refitted, held_out))
    assert ours["results"] == theirs["results"]
    assert ours["facts"] | {"refit": False} == theirs["facts"]
    assert (refitted / "sbr" / "v0001" / "ranks.parquet").read_bytes() == (held_out / "sbr" / "v0001" / "ranks.parquet").read_bytes()


def test_the_output_names_the_model_of_the_figures(refitted: Path, held_out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = "the held-out twin, trained without validation and test sessions"
    assert (manifest(refitted)["figures_of"], manifest(held_out)["figures_of"]) == (twin, "this model")
    facts = manifest(refitted)["refit"]
    assert isinstance(facts, dict) and 1 <= facts["epochs"] <= 3 and facts["calibration"].keys() >= {"repeat", "cold_after_warm"}
    assert manifest(held_out)["refit"] is None
    for run, said in ((refitted, True), (held_out, False)):
        assert not train_sbr(settings(f"sbr.refit={str(said).lower()}"), run, run / "data").made
        assert ("the published model was then trained on all sessions" in capsys.readouterr().out) == said
        done = CliRunner().invoke(cli.app, ["recommend", "--run", str(run)])
        assert ("trained without the newest sessions" in done.stdout) == said
    with serving(refitted) as server:
        assert server.ask("/info").json["figures_of"] == twin


def test_the_calibration_is_that_of_the_twin(refitted: Path) -> None:
    """It is added to the weights of the training on all sessions."""
    from accelerate import Accelerator

    from recommender.training.calibration import Calibration, apply
    from recommender.training.dataset import load_training_data
    from recommender.training.trainer import refit_model

    facts = manifest(refitted)["refit"]
    assert isinstance(facts, dict)
    inputs = load_training_data(settings(), refitted, refitted / "data", everything=True)
    model = refit_model("full", 0, settings(), inputs, Accelerator(), refitted / "again", False, facts["epochs"])
    apply(model, Calibration(**facts["calibration"]))
    published = weights(refitted)
    assert all(torch.equal(tensor, published[name]) for name, tensor in model.state_dict().items())


def test_another_setting_of_refit_is_not_up_to_date(held_out: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(held_out, tmp_path / "run"))
    assert train_sbr(settings(), run, run / "data").made


def test_a_run_stopped_in_the_refit_goes_on_to_the_same_bytes(refitted: Path, tmp_path: Path) -> None:
    run, log = copy_inputs(refitted, tmp_path), tmp_path / "sbr-train" / "metrics.jsonl"
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    stopped = tpad_stopped(
        signal.SIGTERM,
        lambda said: log.exists() and '"full, refit"' in log.read_text(),
        *("train-sbr", "--run", run, "--data", run / "data", *words),
    )
    assert stopped.returncode == 143
    assert not (run / "sbr" / "current").exists()
    checkpoints = {path.parent.name for path in (run / "sbr-train" / "checkpoints").glob("*/step-*")}
    assert checkpoints == {"ID-only-0", "full-0", "full-0-refit"}
    train_sbr(settings(), run, run / "data")
    for name in ("sbr/v0001/model.safetensors", "sbr/v0001/metrics.json", "sbr/v0001/manifest.json", "sbr-train/metrics.jsonl"):
        ours, theirs = ((source / name).read_text(errors="replace") for source in (run, refitted))
        if name.endswith("manifest.json"):
            ours, theirs = (json.loads(source)["files"] for source in (ours, theirs))
        assert ours == theirs, name
    assert not (run / "sbr-train" / "checkpoints").exists()


def test_a_teacher_must_not_have_seen_the_test(refitted: Path, held_out: Path) -> None:
    catalog = load_catalog(refitted / "data")
    train = split_sessions(load_sessions(refitted / "data", catalog), settings().data).train
    assert Teacher(held_out, catalog.item_ids, train)
    with pytest.raises(UserError, match=r"other training sessions .*sbr\.refit=false") as error:
        Teacher(refitted, catalog.item_ids, train)
    assert error.value.code == ARTIFACT and "\n" not in str(error.value)


def test_the_vectors_of_all_sessions_are_read_by_the_published_model_alone(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def tpad(*words: object) -> str:
        done = CliRunner().invoke(cli.app, [*map(str, words), "--run", str(run)])
        assert done.exit_code == 0, done.output
        return done.stdout + done.stderr

    options = ["distill.refit=true", "sbr.dim=8", "sbr.epochs=1", "sbr.models=[full]"]
    said = tpad("distill", "--data", tiny_data, *(word for setting in [*DISTILLING, *options] for word in ("--set", setting)))
    assert "unified MLLM of all sessions" in said
    assert tpad("distill").count("(up to date)") == 2
    tpad("export-embeddings")
    twin, published = (read_embeddings(folder / "embeddings") for folder in (run, run / "refit"))
    log = load_sessions(tiny_data, load_catalog(tiny_data))
    assert twin.version.manifest["sessions_sha256"] == split_sessions(log, load_config(None).data).train.ids_sha256()
    assert published.version.manifest["sessions_sha256"] == log.ids_sha256()
    assert any(not np.array_equal(twin.vectors[half], published.vectors[half]) for half in twin.vectors)
    tpad("train-sbr")
    assert manifest(run)["embeddings_run"] == "refit"
    assert manifest(run)["embeddings_manifest_sha256"] == published.version.manifest_sha256
    assert len(Recommender.load(run).recommend(Recommender.load(run).item_ids[:2], 5).items) == 5
    assert "up to date" in tpad("index")
    os.remove(run / "embeddings" / "current")  # the vectors of the twin are for its figures alone
    assert len(Recommender.load(run).recommend([], 5).items) == 5
    (run / "refit" / "embeddings" / "current").write_text('{"version": "v0009", "manifest_sha256": "0"}')
    with pytest.raises(UserError, match="embeddings v0009 are not those") as error:
        Recommender.load(run)
    assert error.value.code == ARTIFACT
