"""Tests `tpad evaluate`: its figures against plain loops and against ranx, its counts, and that it resumes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from typer.testing import CliRunner

import cli
from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.processes import tpad
from pipeline.core.checkpoint import Checkpoints
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.errors import ARTIFACT, USAGE, UserError
from pipeline.core.files import read_sealed
from recommender.baselines.registry import build_baseline
from recommender.experiments import evaluate as evaluation
from recommender.experiments.evaluate import evaluate, open_inputs
from recommender.experiments.evaluation_cases import EvaluationCases, shuffled_prefixes
from recommender.metrics.evaluator import baseline_ranks
from recommender.metrics.ranks import gini, summarise, target_ranks
from recommender.session_model.windows import PAD, pack, prefixes_of
from recommender.training.dataset import load_training_data
from recommender.training.trainer import train_model

NAMES = ["popularity", "last-item repeat", "SKNN", "ID-only", "full"]


def settings(*more: str) -> Config:
    return load_config(None, ["sbr.dim=8", "sbr.epochs=2", "sbr.batch=64", "sbr.lr=0.01", *more])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def plant(data: Path) -> None:
    """A test session that a training session equals, two that equal another test session, one that repeats an item; targets that
    are in no training session are there already."""
    log = pq.read_table(data / "sessions.parquet").to_pylist()
    of = {name: [event["item_id"] for event in log if event["session_id"] == name] for name in ("s0000", "s0390")}
    newest = max(event["timestamp"] for event in log)
    planted = {"z1": of["s0000"], "z2": of["s0390"], "z3": of["s0390"], "z4": ["item-000", "item-001", "item-000"]}
    for number, (name, items) in enumerate(planted.items()):
        log += [{"session_id": name, "item_id": item, "timestamp": newest + 1000 * (number + 1) + n} for n, item in enumerate(items)]
    pq.write_table(pa.Table.from_pylist(log), data / "sessions.parquet")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    group = write_data(run / "data")
    plant(run / "data")
    publish_embeddings(run, run / "data", group, settings())
    return run


def read(version: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    table = pq.read_table(version.path / "ranks.parquet")
    return json.loads((version.path / "metrics.json").read_bytes()), {name: table[name].to_numpy() for name in table.column_names}


@pytest.fixture(scope="module")
def evaluated(run: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], str]:
    version, text, left_out = evaluate(settings("sbr.seeds=2"), run, run / "data", "time", NAMES)
    assert left_out == ""
    return *read(version), text


def sessions_of(run: Path) -> tuple[list[list[str]], list[list[str]]]:
    """Training and test sessions, by a plain reading of the file and the protocol `time`."""
    sessions: dict[str, list[str]] = {}
    for event in pq.read_table(run / "data" / "sessions.parquet").to_pylist():  # written in order of time
        sessions.setdefault(event["session_id"], []).append(event["item_id"])
    every = list(sessions.values())
    held = int(len(every) * 0.1 + 0.5)
    return every[: len(every) - 2 * held], every[len(every) - held :]


def test_ranks_and_metrics_are_those_of_plain_loops(run: Path, evaluated: tuple[dict[str, Any], dict[str, np.ndarray], str]) -> None:
    metrics, ranks, _ = evaluated
    train, test = sessions_of(run)
    count: dict[str, int] = {}
    for session in train:
        for item in session:
            count[item] = count.get(item, 0) + 1
    items = [f"item-{n:03d}" for n in range(60)]
    expected = []
    for session in test:
        for n in range(1, len(session)):
            scores = {item: count.get(item, 0) for item in items}
            above = sum(scores[item] > scores[session[n]] for item in items)
            level = sum(scores[item] == scores[session[n]] for item in items)
            expected.append(1 + above + (level - 1) / 2)
    assert ranks["popularity"].tolist() == expected
    assert ranks["item_id"].tolist() == [item for session in test for item in session[1:]]
    kinds = metrics["results"]["popularity"]["mean"]
    place = [(session, n) for session in test for n in range(1, len(session))]
    by_hand = {
        "all": [True for _ in place],
        "cold": [session[n] not in count for session, n in place],
        "repeat": [session[n] in session[:n] for session, n in place],
        "prefix 1": [n == 1 for _, n in place],
        "prefix 5+": [n >= 5 for _, n in place],
        "distinct": [session not in train and session is first(test, session) for session, _ in place],
    }
    for name, which in by_hand.items():
        bucket_ranks = [rank for rank, in_bucket in zip(expected, which, strict=True) if in_bucket]
        assert kinds[name]["cases"] == len(bucket_ranks) > 0, name
        assert kinds[name]["HR@20"] == pytest.approx(sum(r <= 20 for r in bucket_ranks) / len(bucket_ranks))
        assert kinds[name]["MRR@20"] == pytest.approx(sum(1 / r for r in bucket_ranks if r <= 20) / len(bucket_ranks))
        assert kinds[name]["NDCG@20"] == pytest.approx(sum(1 / math.log2(1 + r) for r in bucket_ranks if r <= 20) / len(bucket_ranks))
    thirds = [kinds[name]["cases"] for name in ("head", "middle", "tail")]
    assert sum(thirds) == kinds["warm"]["cases"] and min(thirds) > 0


def first(test: list[list[str]], session: list[str]) -> list[str]:
    return next(other for other in test if other == session)


def test_each_model_and_seed_has_its_ranks_and_they_make_its_figures(evaluated: tuple[dict[str, Any], dict[str, np.ndarray], str]) -> None:
    metrics, ranks, text = evaluated
    assert set(ranks) == {"session_id", "position", "item_id", *NAMES[:3], "ID-only-0", "ID-only-1", "full-0", "full-1"}
    hits = [float((ranks[f"full-{seed}"] <= 20).mean()) for seed in (0, 1)]
    full, popularity = (metrics["results"][name] for name in ("full", "popularity"))
    assert full["mean"]["all"]["HR@20"] == pytest.approx(np.mean(hits))
    assert full["std"]["all"]["HR@20"] == pytest.approx(np.std(hits, ddof=1))
    apart = metrics["differences"]["popularity"]["MRR@20"]
    assert apart["mean"] == pytest.approx(popularity["mean"]["all"]["MRR@20"] - full["mean"]["all"]["MRR@20"])
    assert apart["low"] < apart["mean"] < apart["high"] and 0 < apart["p"] <= 1
    assert metrics["differences"]["full"] == {}
    for heading in (
        "## All cases",
        "## Differences to full",
        "## Distinct test sessions",
        "## Does order matter?",
        "## Recommended items",
    ):
        assert heading in text
    spread = metrics["spread"]["last-item repeat"]
    assert 0 < spread["coverage@20"] <= 1 and 0 < spread["Gini@20"] < 1


def test_planted_duplicates_are_counted(run: Path, evaluated: tuple[dict[str, Any], dict[str, np.ndarray], str]) -> None:
    metrics, _, text = evaluated
    train, test = sessions_of(run)
    known = {item for session in train for item in session}
    facts = metrics["facts"]
    assert facts["test_sessions_also_in_training"] == sum(session in train for session in test) >= 1
    assert facts["test_sessions_repeated"] == len(test) - len({tuple(session) for session in test}) >= 2
    assert facts["unseen_targets"] == sum(item not in known for session in test for item in session[1:]) > 0
    assert facts["test_sessions_older_than_newest_training"] == 0 and "0.0% of the test sessions began before" in text
    assert f"{facts['test_sessions_also_in_training']} test sessions are also in training" in text


def test_ranx_agrees(tmp_path: Path) -> None:
    """On lists without ties, which each package ranks in its own way."""
    rng = np.random.default_rng(0)
    scores, targets = rng.permuted(np.tile(np.linspace(0, 1, 50), (40, 1)), axis=1), rng.integers(0, 50, 40)
    (tmp_path / "lists.json").write_text(json.dumps({"scores": scores.tolist(), "targets": targets.tolist()}))
    code = (
        "import json, sys; from ranx import Qrels, Run, evaluate; lists = json.load(open(sys.argv[1]));"
        "qrels = Qrels({str(q): {str(t): 1} for q, t in enumerate(lists['targets'])});"
        "run = Run({str(q): {str(i): s for i, s in enumerate(line)} for q, line in enumerate(lists['scores'])});"
        "names = [f'{m}@{k}' for m in ('hit_rate', 'mrr', 'ndcg') for k in (5, 10, 20)];"
        "print(json.dumps({n: float(v) for n, v in evaluate(qrels, run, names).items()}))"
    )
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}  # compiling takes half a minute
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "lists.json")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = summarise(target_ranks(torch.tensor(scores), torch.tensor(targets)).numpy())
    for name, metric in (("hit_rate", "HR"), ("mrr", "MRR"), ("ndcg", "NDCG")):
        for cutoff in (5, 10, 20):
            assert ours[f"{metric}@{cutoff}"] == pytest.approx(theirs[f"{name}@{cutoff}"]), (metric, cutoff)


def test_shuffled_prefixes_keep_their_items_and_the_fixed_ones() -> None:
    rng = np.random.default_rng(1)
    lengths = [2, 4, 9, 30]
    windows = pack(rng.permutation(1000)[: sum(lengths)].astype(np.int32), np.cumsum([0, *lengths]), max_prefix=6)
    control, (whole, but_last) = shuffled_prefixes(windows)
    prefixes, targets = prefixes_of(windows)
    assert sorted(control) == np.flatnonzero((prefixes != PAD).sum(1) >= 3).tolist()
    for order, fixed in ((whole, 0), (but_last, 1)):
        shown, wanted = prefixes_of(order)
        assert wanted.tolist() == targets[control].tolist()
        changed = 0
        for ours, was in zip(shown, prefixes[control], strict=True):
            before = was[was != PAD]
            assert ours[len(before) :].tolist() == [PAD] * (len(ours) - len(before))
            assert sorted(ours[: len(before)]) == sorted(before)
            assert ours[len(before) - 1] == before[-1] or not fixed
            changed += ours[: len(before)].tolist() != before.tolist()
        assert changed > len(control) / 3


def test_order_is_nothing_to_popularity_and_all_to_the_last_item(run: Path) -> None:
    inputs = load_training_data(settings("sbr.models=[ID-only]"), run, run / "data")
    test = EvaluationCases(inputs, 20)
    train = inputs.split.train
    for name in ("popularity", "co-occurrence"):
        score = build_baseline(name, train, len(inputs.counts))
        as_it_was = baseline_ranks(score, test.windows)[test.control]
        whole, but_last = (baseline_ranks(score, order) for order in test.orders)
        assert np.array_equal(as_it_was, but_last)
        assert np.array_equal(as_it_was, whole) == (name == "popularity")


def test_gini_by_hand() -> None:
    assert gini(np.array([3, 3, 3])) == 0 and gini(np.zeros(4)) == 0
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)
    counts = np.random.default_rng(0).integers(0, 9, 40)
    assert gini(counts) == pytest.approx(np.abs(counts[:, None] - counts).sum() / (2 * 40 * counts.sum()))


def test_a_finished_evaluation_is_not_repeated(run: Path, evaluated: tuple[dict[str, Any], dict[str, np.ndarray], str]) -> None:
    log = run / "evaluation-train" / "time" / "metrics.jsonl"
    before, steps = evaluated[1], log.read_text().count("\n")
    stored = log.parent / "found" / "SKNN" / "step-000001"
    written = stored.stat().st_mtime_ns
    version, _, _ = evaluate(settings("sbr.seeds=2"), run, run / "data", "time", [*NAMES, "content-only"])
    _, ranks = read(version)
    assert all(np.array_equal(ranks[name], before[name]) for name in before)
    assert log.read_text().count("\n") == steps * 3 // 2  # two models had been trained, one was added
    assert stored.stat().st_mtime_ns == written
    again, _, _ = evaluate(settings("sbr.seeds=2"), run, run / "data", "time", [*NAMES, "content-only"])
    assert again.name == version.name


def test_another_split_leaves_out_the_models_that_read_vectors(run: Path) -> None:
    names = [name for name in evaluation.MODELS if not evaluation.MODELS[name].content]
    config = settings("data.protocol=user-hash")
    _, neural, left_out = open_inputs(config, run, run / "data", None)
    assert neural == names and "other training sessions" in left_out
    with pytest.raises(UserError, match=r"other training sessions.*--models ID-only") as error:
        open_inputs(config, run, run / "data", ["full", "ID-only"])
    assert error.value.code == ARTIFACT
    with pytest.raises(UserError, match=r"items\.parquet not found") as error:
        open_inputs(config, run, run, ["full", "ID-only"])
    assert "--models" not in str(error.value)
    version, text, _ = evaluate(settings("sbr.epochs=1"), run, run / "data", "user-hash", ["popularity", "ID-only"])
    assert json.loads((version.path / "metrics.json").read_bytes())["facts"]["test_sessions_older_than_newest_training"] > 20
    assert "a leak" in text and "hash of the session_id" in text and "## Differences to ID-only" in text


def test_paper_max_is_the_maximum_over_the_epochs_and_says_so_everywhere(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version, text, _ = evaluate(settings("sbr.patience=1"), run, run / "data", "paper-max", ["popularity", "ID-only"])
    figures = json.loads((version.path / "metrics.json").read_bytes())["results"]["ID-only"]["mean"]["all"]
    epochs = read_sealed(run / "evaluation-train" / "paper-max" / "found" / "ID-only-0.json")["epochs"].values()
    assert len(epochs) == 2
    for metric, value in figures.items():
        assert value == max(epoch["all"][metric] for epoch in epochs)
    tables = [line for line in text.splitlines() if line.startswith("## ")]
    assert tables and all("paper-max: maximum over the epochs on the test" in line for line in tables)
    assert not (version.path / "ranks.parquet").exists()
    assert "ID-only (seed 0)" in capsys.readouterr().err
    again, _, _ = evaluate(settings("sbr.patience=1"), run, run / "data", "paper-max", ["popularity", "S-POP", "ID-only"])
    assert json.loads((again.path / "metrics.json").read_bytes())["results"]["ID-only"]["mean"]["all"] == figures
    assert "ID-only (seed 0)" not in capsys.readouterr().err  # trained once


def test_scores_that_are_nan_are_one_clear_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings("sbr.epochs=1", "sbr.models=[ID-only]", "seed=7")
    inputs = load_training_data(config, run, run / "data")
    work = run / "evaluation-train" / "time"
    train_model("ID-only", 7, config, inputs, inputs.windows(20)[:2], Accelerator(), work, False)
    folder = work / "checkpoints" / "ID-only-7"
    checkpoints = Checkpoints(folder, read_sealed(next(folder.glob("step-*/state.json")))["fingerprint"])
    step, tensors, state = checkpoints.newest() or pytest.fail("no checkpoint")
    checkpoints.save(step, {name: torch.full_like(of, torch.nan) for name, of in tensors.items()}, state)
    with pytest.raises(UserError, match=r"NaN \(ID-only, seed 7\).*sbr\.lr") as error:
        evaluate(config, run, run / "data", "time", ["ID-only"])
    assert error.value.code == USAGE
    evaluate(
        settings("sbr.epochs=1", "sbr.lr=0.02", "seed=7"), run, run / "data", "time", ["ID-only"]
    )  # what was kept does not stand in the way
    assert "ID-only (seed 7) is trained anew" in capsys.readouterr().err


def test_the_command_prints_the_main_table_and_refuses_unknown_names(run: Path) -> None:
    done = tpad("evaluate", "--run", run, "--data", run / "data", "--models", "popularity,ID-only", "--set", "sbr.epochs=1")
    assert done.returncode == 0, done.stderr
    assert "| ID-only | " in done.stdout and "duplicates: " in done.stdout and "report.md" in done.stderr
    for words, said in (
        (["--models", "full,best"], "no model `best` (--models); known: "),
        (["--models", ","], "no model (--models ','); known: "),
        (["--protocol", "paper-max", "--against", "full"], "paper-max compares no models"),
    ):
        done = CliRunner().invoke(cli.app, ["evaluate", "--run", str(run), *words])
        assert done.exit_code == USAGE and done.stderr.startswith(f"error: {said}")
