"""The options of the transfer phase: intents, a teacher and summaries are learned from, and change nothing of how a run goes."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save

from helpers.processes import kill_when, start, two_processes
from helpers.runs import STEPS, distill_run, losses, same, settings, weights
from helpers.server import publish_again
from pipeline.core.artifact import open_verified
from pipeline.core.errors import ARTIFACT, USAGE, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.session_log import load_sessions
from pipeline.data.split import split_by_time
from pipeline.distill.experimental.session_summaries import folds, summary_key
from pipeline.distill.windows import window_starts
from pipeline.mllm.prompts import PromptPart, Prompts
from pipeline.objectives.contrastive import soft_loss
from recommender.retrieval.saved_model import load_model
from recommender.session_model.windows import pad_prefixes
from recommender.training.teacher import Teacher
from recommender.training.train import train_sbr


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(tiny_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    shutil.copytree(tiny_run / "embeddings", run / "embeddings")
    train_sbr(settings("sbr.epochs=1", "sbr.dim=16", "sbr.refit=false"), run, tiny_data)
    return run


@pytest.fixture(scope="module")
def options(teacher: Path) -> list[str]:
    words = ["items=2", "intent=0.3", "summary=2", "summary_tokens=4", f"teacher={teacher}"]
    return [*(f"distill.transfer.{word}" for word in words), "export.token_budget=300"]


def with_knowledge(tiny_run: Path, run: Path) -> Path:
    """A run whose first stage is done."""
    shutil.copytree(tiny_run / "distill" / "knowledge", run / "distill" / "knowledge")
    return run


@pytest.fixture(scope="module")
def run(tiny_run: Path, tiny_data: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with all of them, that nothing disturbed."""
    run = with_knowledge(tiny_run, tmp_path_factory.mktemp("options") / "run")
    distill_run(run, tiny_data, *options)
    return run


def summaries(run: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for line in (run / "distill" / "summaries.jsonl").read_text().splitlines()[1:]:
        texts |= json.loads(line)
    return texts


# --- each option


def test_intent_and_soft_targets_are_learned(tiny_run: Path, tiny_data: Path, teacher: Path, tmp_path: Path) -> None:
    more = ("steps=40", "lr=3e-3", "batch=16", "intent=0.3", f"teacher={teacher}")
    run = with_knowledge(tiny_run, tmp_path)
    distill_run(run, tiny_data, *(f"distill.transfer.{setting}" for setting in more), "distill.align.steps=1")
    found = losses(run)
    for name in ("intent", "soft"):
        early, late = (np.mean([found["transfer", step][name] for step in of]) for of in (range(8), range(32, 40)))
        assert 0 < late < early, name


def test_an_intent_is_what_most_items_of_a_session_have_in_common(tiny_data: Path) -> None:
    prompts = Prompts(load_catalog(tiny_data), settings().data)
    items = pq.read_table(tiny_data / "items.parquet").to_pylist()
    log = split_by_time(load_sessions(tiny_data, load_catalog(tiny_data)), 0.1, 0.1).train
    found = []
    for rows in map(log.session, range(len(log))):
        expected = []
        for column in ("kind", "style", "motif"):
            (value, count), *_ = Counter(items[row][column] for row in set(rows.tolist())).most_common()
            expected += [f"{column}: {value}"] if count > 1 and 2 * count > len(set(rows.tolist())) else []
        assert prompts.common(rows) == ", ".join(expected)
        found.append(", ".join(expected))
    assert "" in found
    assert any(found)
    assert prompts.common([3, 3, 3]) == ""
    parts = prompts.session([3, 5, 8], intent="kind: mug")
    wording = [PromptPart("words", "In common:"), PromptPart("intent", "kind: mug"), PromptPart("words", "Next item:")]
    assert parts[-6:] == [PromptPart("turn"), PromptPart("read"), *wording, PromptPart("answer", prompts.text(8))]


def test_an_intent_needs_a_column_to_be_told_by(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill\.transfer\.intent needs item columns") as error:
        distill_run(tmp_path, tiny_data, "distill.transfer.intent=0.3", "data.attributes=[]")
    assert error.value.code == USAGE


def test_soft_targets_are_the_teachers_own_scores(teacher: Path, tiny_data: Path) -> None:
    catalog = load_catalog(tiny_data)
    train = split_by_time(load_sessions(tiny_data, catalog), 0.1, 0.1).train
    order = np.random.default_rng(0).permutation(len(catalog))
    place = np.argsort(order)
    prefixes = [torch.tensor(rows) for rows in ([3], [3, 5], [7, 3, 5, 3])]
    candidates = torch.tensor([1, 3, 4, 5, 9])
    same_order, other_order = (
        Teacher(teacher, catalog.item_ids, train),
        Teacher(teacher, [catalog.item_ids[n] for n in order], train.moved(place)),
    )
    one = same_order(prefixes, candidates)
    asked = torch.as_tensor(place)[candidates].sort()  # ascending, as a step asks for them
    two = other_order([torch.as_tensor(place)[p] for p in prefixes], asked.values)
    torch.testing.assert_close(one[:, asked.indices], two)
    assert one.shape == (3, 5)
    assert soft_loss(one + 3, one) == pytest.approx(0, abs=1e-6)
    assert soft_loss(-one, one) > 0.01


def test_a_session_is_no_evidence_for_its_own_soft_targets(teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    """What followed in training is the session's own secret: with other counts of it, the teacher says the same."""
    catalog = load_catalog(tiny_data)
    train = split_by_time(load_sessions(tiny_data, catalog), 0.1, 0.1).train
    other = Path(shutil.copytree(teacher, tmp_path / "run"))
    counted = load_file(open_verified(other / "sbr", "sbr", "").path / "model.safetensors")
    publish_again(
        other,
        model_safetensors=save(
            {name: 9 - 0 * of if name.startswith("pairs.") and name.endswith(".counts") else of for name, of in counted.items()}
        ),
    )
    prefixes, candidates = [torch.tensor(train.session(n)[:-1]) for n in range(5)], torch.arange(len(catalog))
    one, two = (Teacher(run, catalog.item_ids, train)(prefixes, candidates) for run in (teacher, other))
    assert torch.equal(one, two) and not torch.equal(one[0], one[1])
    models = [load_model(open_verified(run / "sbr", "sbr", "").path) for run in (teacher, other)]
    asked = torch.tensor(pad_prefixes([prefix.tolist() for prefix in prefixes], 8)).long()
    assert not torch.equal(*(model.scores(asked, model.tables()) for model in models))


def test_a_teacher_of_other_sessions_is_refused(teacher: Path, tiny_data: Path, tmp_path: Path) -> None:
    for more, message in (
        ([f"distill.transfer.teacher={teacher}", "data.valid=0.2"], "trained on other training sessions"),
        ([f"distill.transfer.teacher={tmp_path}"], "run `tpad train-sbr` there first"),
    ):
        with pytest.raises(UserError, match=message) as error:
            distill_run(tmp_path / "run", tiny_data, *more)
        assert error.value.code == ARTIFACT
        assert str(error.value).count("\n") == 0
    assert not (tmp_path / "run" / "distill" / "knowledge").exists()


@pytest.mark.parametrize("items", [1, 2, 4])
def test_every_item_of_a_long_session_is_asked_for_once_after_all_that_came_before(items: int, tiny_data: Path) -> None:
    log = split_by_time(load_sessions(tiny_data, load_catalog(tiny_data)), 0.1, 0.1).train
    keys = [set(level) for level in folds(log, items, 3)]
    assert all(keys) or items == 4
    for rows in map(log.session, range(len(log))):
        asked = [row for first in window_starts(rows, items) for row in rows[first + 1 : first + items + 1]]
        assert asked == list(rows[1:])
        for first in window_starts(rows, items)[1:]:
            earlier = rows[max(0, first - 3 * items) : first]
            for n in range(items, len(earlier) + 1, items):  # each can be written after the one before it
                assert summary_key(earlier[:n]) in keys[n // items - 1]


def test_a_summary_is_shown_before_the_items(run: Path, tiny_data: Path) -> None:
    texts = summaries(run)
    assert len(texts) > 50
    assert len(set(texts.values())) > 1  # K tells blocks apart
    prompts = Prompts(load_catalog(tiny_data), settings().data)
    begin = [PromptPart("words", "Earlier:"), PromptPart("text", "a mug")]
    assert prompts.session([3, 5], earlier="a mug") == [*begin, *prompts.session([3, 5])]
    assert prompts.summary("a mug", [3])[:2] == begin
    assert prompts.summary("", [3])[-2:] == [PromptPart("words", "In short:"), PromptPart("turn")]


# --- all of them, however the run goes


def test_killed_in_the_middle_of_summaries_and_of_training_it_ends_with_the_same_weights(
    tiny_run: Path, tiny_data: Path, run: Path, options: list[str], tmp_path: Path
) -> None:
    again = with_knowledge(tiny_run, tmp_path / "run")
    file = again / "distill" / "summaries.jsonl"
    kill_when(start(distill_run, again, tiny_data, *options), lambda: file.exists() and file.read_bytes().count(b"\n") > 4)
    assert 0 < len(summaries(again)) < len(summaries(run))
    with file.open("ab") as cut:
        cut.write(b'{"0123": "a line cut sh')
    kill_when(start(distill_run, again, tiny_data, *options), (again / "distill" / "transfer" / "step-000002" / "state.json").exists)
    assert not (again / "distill" / "transfer" / f"step-{STEPS:06d}").exists()
    distill_run(again, tiny_data, *options)
    assert summaries(again) == summaries(run)
    assert same(weights(again), weights(run))
    assert losses(again) == losses(run)


def test_two_processes_write_and_learn_what_one_does(
    tiny_run: Path, tiny_data: Path, run: Path, options: list[str], tmp_path: Path
) -> None:
    again = with_knowledge(tiny_run, tmp_path / "run")
    two_processes(distill_run, again, tiny_data, *options)
    assert summaries(again) == summaries(run)
    one, two = losses(run), losses(again)
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].keys() == two[key].keys()
        assert all(abs(one[key][name] - two[key][name]) < 1e-3 for name in one[key]), key
    assert {"intent", "soft"} <= one["transfer", 0].keys()


def test_another_teacher_is_another_training(teacher: Path, tiny_data: Path, run: Path, options: list[str], tmp_path: Path) -> None:
    other = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    moved = [*options[:-2], f"distill.transfer.teacher={other}", options[-1]]
    assert not distill_run(run, tiny_data, *moved)  # the same one elsewhere: up to date
    train_sbr(settings("sbr.epochs=1", "sbr.dim=8", "sbr.refit=false"), other, tiny_data)
    with pytest.raises(UserError, match="other settings or data") as error:
        distill_run(run, tiny_data, *moved)
    assert error.value.code == ARTIFACT
