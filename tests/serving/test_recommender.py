"""Tests recommendations from a published session model: single sessions, files, filters, reasons, refusals."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import cli
from helpers.fake_embeddings import GROUPS, publish_embeddings, write_data
from helpers.processes import contents
from pipeline.core.config_file import load_config
from pipeline.core.errors import ARTIFACT, DATA, USAGE, UserError
from pipeline.data.embeddings import read_embeddings
from pipeline.data.prepare.database import database
from pipeline.data.prepare.events import SessionRules, load_events
from pipeline.data.prepare.open_tables import open_tables
from pipeline.data.prepare.table_options import Report, TableOptions
from recommender.retrieval.index_tuning import WANTED, check
from recommender.serving import batch_scorer
from recommender.serving import recommend_file as batch
from recommender.serving import recommender as recommend
from recommender.serving.live_version import LoadedVersion
from recommender.serving.recommend_file import recommend_file
from recommender.serving.recommender import Recommender
from recommender.training.rebuild_index import refresh
from recommender.training.train import train_sbr

# without refit, so that there are cold items
SETTINGS = load_config(None, ["sbr.dim=16", "sbr.epochs=2", "sbr.batch=32", "sbr.refit=false"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    publish_embeddings(folder, folder / "data", write_data(folder / "data"), SETTINGS)
    train_sbr(SETTINGS, folder, folder / "data")
    return folder


@pytest.fixture(scope="module")
def recommender(run: Path) -> Recommender:
    return Recommender.load(run)


def ids(answer: recommend.Recommendation) -> list[str]:
    return [item.item_id for item in answer.items]


def companion(recommender: Recommender, item_id: str) -> str:
    """The item that followed it most often in training."""
    followers = dict(recommender.batch_scorer.model.pair_counts())["next_item_counts"]
    _, entry = followers.entries(torch.tensor([recommender.row[item_id]]))
    return recommender.item_ids[int(followers.keys[entry[followers.counts[entry].argmax()]]) % 60]


def test_a_session_gets_the_best_items_with_titles(recommender: Recommender) -> None:
    session = recommender.samples[0]
    answer = recommender.recommend(session, k=5)
    with torch.no_grad():
        rows = torch.tensor([[recommender.row[i] for i in session]])
        scores = recommender.batch_scorer.model.scores(rows, recommender.batch_scorer.tables)[0]
    assert [recommender.row[i] for i in ids(answer)] == scores.topk(5).indices.tolist()
    assert [item.rank for item in answer.items] == [1, 2, 3, 4, 5]
    assert all(item.title == f"Title {int(item.item_id[-3:])}" for item in answer.items)
    assert answer.unknown == []
    assert answer.fallback is None


def test_each_item_has_its_reasons(recommender: Recommender) -> None:
    """Items of one group look alike; what mostly followed an item in training comes after it."""
    group = {item_id: row % GROUPS for row, item_id in enumerate(recommender.item_ids)}
    session = ["item-000", "item-002", "item-000", "nonsense"]  # of the groups 0 and 2
    by_id = {item.item_id: item for item in recommender.recommend(session, 60).items}
    alike = {item_id: item.similar_to for item_id, item in by_id.items() if group[item_id] in (0, 2) and item_id not in session}
    assert alike == {item_id: session[group[item_id] // 2] for item_id in alike}
    assert [by_id[companion(recommender, item_id)].after for item_id in session[:2]] == session[:2]
    for item_id in session[:2]:
        assert item_id not in (by_id[item_id].similar_to, by_id[item_id].after)
    assert all(item.similar_to is item.after is None for item in recommender.recommend([], 5).items)


def test_a_batch_of_sessions_gets_the_rankings_of_single_sessions(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_scorer, "SCORES_AT_ONCE", 20_000)  # some ten sessions
    rng = np.random.default_rng(0)
    sessions = [[f"item-{n:03d}" for n in rng.integers(0, 60, size=rng.integers(0, 30))] for _ in range(50)]
    for filters in (None, {"colour": ["red"]}):
        for session, together in zip(sessions, recommender.recommend_batch(sessions, 7, filters=filters), strict=True):
            alone = recommender.recommend(session, 7, filters=filters)
            assert ids(alone) == ids(together)
            assert np.allclose([i.score for i in alone.items], [i.score for i in together.items], atol=1e-4)


def test_equal_scores_come_in_the_order_of_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any k and number of sessions. A model of ids alone gives the eight cold items equal scores."""
    write_data(tmp_path / "data")
    train_sbr(load_config(None, ["sbr.dim=8", "sbr.epochs=1", "sbr.models=[ID-only]", "sbr.refit=false"]), tmp_path, tmp_path / "data")
    ids_only = Recommender.load(tmp_path)
    sessions = [[0, 3], [7], [21, 4, 21], [30]]
    complete = [rows.tolist() for rows, _ in ids_only.rank(sessions, 60)]
    assert all(rows[-8:] == list(range(52, 60)) for rows in complete)
    for items, together in (
        (recommend.FULL_SCORING_ITEMS, 1),
        (recommend.FULL_SCORING_ITEMS, 16),
        (0, 16),
    ):  # in PyTorch, in numpy, through the index
        monkeypatch.setattr(recommend, "FULL_SCORING_ITEMS", items)
        monkeypatch.setattr(recommend, "BATCH_SESSIONS", together)
        for k in (1, 51, 53, 57, 60):
            assert [rows.tolist() for rows, _ in ids_only.rank(sessions, k)] == [rows[:k] for rows in complete]
            assert ids_only.rank(sessions[:1], k)[0][0].tolist() == complete[0][:k]


def test_a_large_catalogue_goes_through_the_index_to_the_same_items(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [*recommender.samples, ["item-059"], ["item-003"] * 25]
    complete = [recommender.recommend_batch(sessions, 8, exclude) for exclude in (False, True)]
    monkeypatch.setattr(recommend, "FULL_SCORING_ITEMS", 0)
    indexed = [recommender.recommend_batch(sessions, 8, exclude) for exclude in (False, True)]
    for one, other in zip([*complete[0], *complete[1]], [*indexed[0], *indexed[1]], strict=True):
        assert np.allclose([i.score for i in one.items], [i.score for i in other.items], atol=1e-4)


@pytest.mark.parametrize("index", ["hnsw", "ivf", "IVF2,SQ8"])
def test_another_index_can_be_built_for_a_trained_model(run: Path, recommender: Recommender, tmp_path: Path, index: str) -> None:
    """Its recall is recorded; on sixty items it is nearly 1."""
    later = Path(shutil.copytree(run, tmp_path / "run"))
    done = refresh(later, later / "data", index)
    assert (done.added, done.removed, done.made) == (0, 0, True)
    assert not refresh(later, later / "data", index).made
    assert refresh(later, later / "data", index, rebuild=True).made
    facts = done.version.manifest["index"]
    assert facts["setting"] == index
    assert facts["exact"] is False
    assert facts["recall@20"] > 0.9
    other = Recommender.load(later)
    assert not other.index.exact
    assert other.index.effort == facts["effort"]
    same = [set(ids(other.recommend(s, 8))) & set(ids(recommender.recommend(s, 8))) for s in recommender.samples]
    assert np.mean([len(common) for common in same]) > 7
    assert len(ids(other.recommend(recommender.samples[0], 60))) == 60
    said = list(check(other.index, other.sample_rows(), facts))
    assert f"(when it was built: {facts['recall@20']:.4f})" in said[1]


def test_a_search_spends_no_more_than_its_recall_takes(run: Path, tmp_path: Path) -> None:
    """Two of thirty lists hold too few of the first 20: more of them are looked into, until nearly all are found."""
    later = Path(shutil.copytree(run, tmp_path / "run"))
    easy, hard = (refresh(later, later / "data", index).version.manifest["index"] for index in ("hnsw", "IVF30,Flat"))
    assert easy["effort"] < hard["effort"]
    assert hard["recall@20"] >= WANTED


def test_vectors_cut_to_their_main_directions_are_the_same_under_another_index(run: Path, tmp_path: Path) -> None:
    later = Path(shutil.copytree(run, tmp_path / "run"))
    train_sbr(load_config(None, ["sbr.dim=16", "sbr.epochs=1", "sbr.components=3", "sbr.models=[full]"]), later, later / "data")
    before = Recommender.load(later).halves
    assert {half: vectors.shape for half, vectors in before.items()} == dict.fromkeys(before, (60, 3))
    assert refresh(later, later / "data", rebuild=True).made
    after = Recommender.load(later).halves
    for half, vectors in before.items():
        np.testing.assert_allclose(after[half], vectors, atol=1e-6)


def test_an_index_that_cannot_be_built_is_refused_before_the_training(run: Path) -> None:
    for index in ("fast", "PQ7"):
        with pytest.raises(UserError, match="FAISS cannot build") as error:
            train_sbr(load_config(None, [f"sbr.index={index}"]), run, run / "data")
        assert error.value.code == USAGE


def test_filters_keep_the_matching_items_and_still_return_k(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    session = recommender.samples[0]
    for items in (recommend.FULL_SCORING_ITEMS, 0):  # scored whole, and through the index
        monkeypatch.setattr(recommend, "FULL_SCORING_ITEMS", items)
        red = recommender.recommend(session, 60, filters={"colour": ["red"]}).items
        assert {item.item_id for item in red} == {i for row, i in enumerate(recommender.item_ids) if row % 4 == 0}
        score = {item.item_id: item.score for item in recommender.recommend(session, 60).items}
        assert [item.score for item in red] == pytest.approx([score[item.item_id] for item in red], abs=1e-4)
        seen = ids(recommender.recommend(session, 45))
        unseen = {row for row, item_id in enumerate(recommender.item_ids) if row % 4 < 2 and item_id not in seen}
        left = ids(recommender.recommend(seen, 15, True, {"colour": ["red", "blue"]}))
        assert {recommender.row[i] for i in left} == unseen and len(left) == len(unseen) > 0
        both = ids(recommender.recommend(session, 60, filters={"colour": ["red", "blue"], "tags": ["t1", "t9"]}))
        assert {recommender.row[i] for i in both} == {row for row in range(60) if row % 4 < 2 and row % 5 == 1}
    assert recommender.row[ids(recommender.recommend([], 1, filters={"tags": ["t2"]}))[0]] % 5 in (1, 2)


@pytest.mark.parametrize(
    ("filters", "said"), [({"size": ["1"]}, "no attribute `size`.*colour, tags"), ({"tags": ["t"]}, "no item has tags 't'")]
)
def test_a_filter_without_a_matching_item_is_an_error(recommender: Recommender, filters: dict[str, list[str]], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        recommender.recommend(["item-001"], 5, filters=filters)
    assert error.value.code == USAGE


def test_diversity_spreads_the_ranking_over_the_groups_of_content(recommender: Recommender) -> None:
    """Items of one group look alike; with as much diversity as there is, the groups take turns."""
    session = recommender.samples[0]
    plain, spread = (recommender.recommend(session, 6, diversify=by).items for by in (0.0, 0.9))
    assert plain[0] == spread[0]
    assert len({recommender.row[i.item_id] % GROUPS for i in spread}) > len({recommender.row[i.item_id] % GROUPS for i in plain})
    assert [item.rank for item in spread] == [1, 2, 3, 4, 5, 6]
    assert len(recommender.recommend(session, 1000, diversify=0.5).items) == 60
    (colour,) = {recommender.attributes["colour"][0].as_py()}
    wanted = {"colour": [colour]}
    every = ids(recommender.recommend(session, 60, filters=wanted))
    assert recommender.recommend(every, 6, exclude_seen=True, filters=wanted, diversify=0.5).items == []  # no item is left
    with pytest.raises(UserError, match="from 0 to 1"):
        recommender.recommend(session, 6, diversify=2)


def test_seen_items_are_excluded_on_request_and_k_items_returned(recommender: Recommender) -> None:
    session = ids(recommender.recommend(recommender.samples[1], 6))
    assert set(session) & set(ids(recommender.recommend(session, 10)))
    unseen = ids(recommender.recommend(session, 10, exclude_seen=True))
    assert len(unseen) == 10
    assert not set(session) & set(unseen)


def test_new_items_are_recommended_without_training(run: Path, recommender: Recommender, tmp_path: Path) -> None:
    """Items come, go and move; those that stay score as before, and a new one like the cold item whose vectors it has."""
    later = Path(shutil.copytree(run, tmp_path / "run"))
    items = pq.read_table(later / "data" / "items.parquet").to_pylist()
    exported = read_embeddings(run / "embeddings")
    order = [*range(59, 20, -1), 55, 55, *range(20)]  # without item-020, and 55, which is cold, twice more
    named = [f"new-{n}" if 39 <= n <= 40 else items[row]["item_id"] for n, row in enumerate(order)]
    pq.write_table(pa.table({"item_id": named, "title": named}), later / "data" / "items.parquet")
    halves = np.stack([exported.knowledge[order], exported.transition[order]])
    publish_embeddings(later, later / "data", np.zeros(len(order), int), SETTINGS, halves=halves, sessions_sha256="as before")
    with pytest.raises(UserError, match="tpad index"):
        Recommender.load(later)
    done = refresh(later, later / "data")
    assert (done.added, done.removed, done.made) == (2, 1, True)
    assert not refresh(later, later / "data").made
    pq.write_table(pa.table({"item_id": named, "title": ["another", *named[1:]]}), later / "data" / "items.parquet")
    with pytest.raises(UserError, match=r"of another catalogue.*tpad export-embeddings"):
        refresh(later, later / "data")
    new = Recommender.load(later)
    for session in recommender.samples[:5]:
        session = [item for item in session if item != "item-020"]
        score = {item.item_id: item.score for item in new.recommend(session, len(named)).items}
        assert set(score) == set(named)
        assert score["new-39"] == pytest.approx(score["item-055"] if "item-055" not in session else score["new-40"], abs=1e-4)
        assert ids(new.recommend(["new-39"], 5))
        before = {item.item_id: item.score for item in recommender.recommend(session, 60).items}
        same = [item for item in before if item in score]
        assert len(same) == 59
        best = sorted(same, key=lambda item: -before[item])[:10]
        assert len(set(best) & set(sorted(same, key=lambda item: -score[item])[:10])) >= 8


def test_an_index_over_vectors_of_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    later = Path(shutil.copytree(run, tmp_path / "run"))
    publish_embeddings(later, later / "data", np.zeros(60, int), SETTINGS, seed=1, mllm_sha256="another")
    with pytest.raises(UserError, match="run `tpad train-sbr`") as error:
        refresh(later, later / "data")
    assert error.value.code == ARTIFACT


def test_items_skipped_for_their_images_are_not_recommended(run: Path, tmp_path: Path) -> None:
    later = tmp_path / "run"
    shutil.copytree(run / "data", later / "data")
    group = write_data(later / "data")
    publish_embeddings(later, later / "data", group, SETTINGS, skipped=[3, 57])
    train_sbr(SETTINGS, later, later / "data")
    trained = Recommender.load(later)
    answer = trained.recommend(["item-003", "item-004"], 60)
    assert len(answer.items) == 58
    assert answer.unknown == ["item-003"]
    assert not {"item-003", "item-057"} & set(ids(answer))
    blue = ids(trained.recommend(["item-004"], 60, filters={"colour": ["blue"]}))
    assert set(blue) == {f"item-{n:03d}" for n in range(1, 60, 4)} - {"item-057"}


def test_another_index_brings_no_skipped_items_to_a_model_of_ids_beside_vectors(run: Path, tmp_path: Path) -> None:
    later = tmp_path / "run"
    publish_embeddings(later, later / "data", write_data(later / "data"), SETTINGS, skipped=[3, 57])
    settings = SETTINGS.sbr.model_copy(update={"models": ["ID-only", "content-only"], "epochs": 1})
    train_sbr(SETTINGS.model_copy(update={"sbr": settings}), later, later / "data")
    before = Recommender.load(later)
    refreshed = refresh(later, later / "data", "hnsw")
    assert (refreshed.made, refreshed.added, refreshed.removed) == (True, 0, 0)
    now = Recommender.load(later)
    assert now.item_ids == before.item_ids and len(now.item_ids) == 58
    assert now.recommend(["item-003", "item-004"]).unknown == ["item-003"]


def test_an_unknown_id_is_named_and_ignored(recommender: Recommender) -> None:
    answer = recommender.recommend(["nonsense", "item-004", "nonsense", "other"], 5)
    assert answer.unknown == ["nonsense", "other"]
    assert ids(answer) == ids(recommender.recommend(["item-004"], 5))


@pytest.mark.parametrize("session", [[], ["nonsense"]])
def test_a_session_without_known_items_gets_the_popular_ones(recommender: Recommender, run: Path, session: list[str]) -> None:
    answer = recommender.recommend(session, 4)
    assert answer.fallback == "popular"
    log = pq.read_table(run / "data" / "sessions.parquet").to_pydict()
    train = [i for s, i in zip(log["session_id"], log["item_id"], strict=True) if s < "s0320"]
    top = sorted((train.count(i) for i in set(train)), reverse=True)[:4]
    assert [train.count(i) for i in ids(answer)] == top
    assert [item.score for item in answer.items] == pytest.approx([math.log((n + 1) / (len(train) + 60)) for n in top], abs=1e-4)


def test_popular_items_are_those_with_most_events_whatever_the_prior_of_the_model(run: Path, tmp_path: Path) -> None:
    """Without popularity in its scores too; of items seen as often, and of those never seen, the earlier ones come first."""
    later = Path(shutil.copytree(run, tmp_path / "run"))
    settings = ["sbr.dim=16", "sbr.epochs=1", "sbr.models=[full]", "sbr.parts.popularity=false", "sbr.refit=false"]
    version = train_sbr(load_config(None, settings), later, later / "data").version
    count = pq.read_table(version.path / "items.parquet")["count"].to_pylist()
    wanted = sorted(range(60), key=lambda row: -count[row])
    assert count[wanted[-8]] == 0 and wanted != list(range(60))
    assert [int(item[-3:]) for item in ids(Recommender.load(later).recommend([], 60))] == wanted
    assert LoadedVersion.load(later).search("title").tolist() == wanted


def test_a_k_above_the_number_of_items_gives_all_items(recommender: Recommender) -> None:
    assert len(ids(recommender.recommend(["item-001"], 1000))) == 60
    assert len(ids(recommender.recommend(["item-001"], 1000, exclude_seen=True))) == 59


def test_k_of_zero_is_an_error(recommender: Recommender) -> None:
    with pytest.raises(UserError) as error:
        recommender.recommend(["item-001"], 0)
    assert error.value.code == USAGE


# --- the weight of new items


@pytest.mark.parametrize("shift", [-3.0, 0.0, 2.0, 0.5])
def test_new_items_shifts_the_scores_of_cold_items(recommender: Recommender, monkeypatch: pytest.MonkeyPatch, shift: float) -> None:
    """Scores of other items stay, for single sessions (numpy), batches (PyTorch), and the index, whose results stay exact."""
    cold = ~recommender.arrays["known"]
    assert cold.sum() == 8
    sessions = [[1], [3, 57, 3], [58], list(range(12)), [20, 21, 22], [40], [51, 52], [7, 7, 7], [59, 0]]
    with torch.no_grad():
        scorer = recommender.batch_scorer
        plain = np.stack([scorer.model.scores(torch.tensor([s]), scorer.tables)[0].numpy() for s in sessions])
    wanted = plain + shift * cold
    for items, together in ((recommend.FULL_SCORING_ITEMS, 16), (recommend.FULL_SCORING_ITEMS, 1), (0, 16)):
        monkeypatch.setattr(recommend, "FULL_SCORING_ITEMS", items)
        monkeypatch.setattr(recommend, "BATCH_SESSIONS", together)
        for k in (1, 5, 20, 60):
            for scores, (rows, values) in zip(wanted, recommender.rank(sessions, k, new_items=shift), strict=True):
                np.testing.assert_allclose(values, scores[rows], atol=2e-4)
                np.testing.assert_allclose(values, -np.sort(-scores)[:k], atol=2e-4)
        for scores, (rows, values) in zip(wanted, recommender.rank(sessions, 6, True, {"colour": ["red"]}, new_items=shift), strict=True):
            assert (rows % 4 == 0).all()
            np.testing.assert_allclose(values, scores[rows], atol=2e-4)
    popular = recommender.rank([[]], 60, new_items=shift)[0]
    before = dict(zip(*(part.tolist() for part in recommender.rank([[]], 60, new_items=0.0)[0]), strict=True))
    np.testing.assert_allclose(popular[1], [before[row] + shift * cold[row] for row in popular[0]], atol=1e-5)
    assert (np.diff(popular[1]) <= 0).all()


def test_an_index_with_a_short_first_search_is_exact(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift lifts cold items out of all lists that were computed without it."""
    monkeypatch.setattr(recommend, "FULL_SCORING_ITEMS", 0)
    monkeypatch.setattr(recommender.index, "first", 2)
    with torch.no_grad():
        for session in ([1], [3, 57], [58], [20, 21, 22]):
            scores = recommender.batch_scorer.model.scores(torch.tensor([session]), recommender.batch_scorer.tables)[0].numpy()
            for shift in (-3.0, 0.0, 2.0, 8.0):
                shifted = scores + shift * ~recommender.arrays["known"]
                (_, values), *_ = recommender.rank([session], 3, new_items=shift)
                np.testing.assert_allclose(values, -np.sort(-shifted)[:3], atol=2e-4)


def test_new_items_works_for_a_model_of_ids_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of cold items: they come last, and first only of those it says nothing of."""
    write_data(tmp_path / "data")
    train_sbr(load_config(None, ["sbr.dim=8", "sbr.epochs=1", "sbr.models=[ID-only]", "sbr.refit=false"]), tmp_path, tmp_path / "data")
    ids_only = Recommender.load(tmp_path)
    for items, together in ((recommend.FULL_SCORING_ITEMS, 1), (recommend.FULL_SCORING_ITEMS, 0), (0, 16)):
        monkeypatch.setattr(recommend, "FULL_SCORING_ITEMS", items)
        monkeypatch.setattr(recommend, "BATCH_SESSIONS", together)
        (plain, scores), *_ = ids_only.rank([[0, 3]], 60)
        (shifted, raised), *_ = ids_only.rank([[0, 3]], 60, new_items=2.0)
        assert plain.tolist() == shifted.tolist() and plain[-8:].tolist() == list(range(52, 60))
        np.testing.assert_allclose(raised - scores, 2.0 * (plain >= 52), atol=1e-4)


def test_new_items_has_a_default_of_the_run(
    run: Path, recommender: Recommender, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = Path(shutil.copytree(run, tmp_path / "run"))
    words = ["--run", str(later), "--data", str(later / "data"), *("--set", "sbr.new_items=2")]
    done = CliRunner().invoke(cli.app, ["index", *words])
    assert done.exit_code == 0, done.output
    raised = Recommender.load(later)
    assert raised.version.name == "v0002" and raised.new_items == 2
    assert "up to date" in CliRunner().invoke(cli.app, ["index", "--run", str(later)]).stderr
    for session in ([1], []):
        for one, other in (
            (raised.rank([session], 60), recommender.rank([session], 60, new_items=2.0)),
            (raised.rank([session], 60, new_items=0.0), recommender.rank([session], 60)),
        ):
            assert one[0][0].tolist() == other[0][0].tolist() and np.array_equal(one[0][1], other[0][1])

    def first(*more: str) -> list[dict[str, object]]:
        done = CliRunner().invoke(cli.app, ["recommend", "--run", str(later), "--session", "item-001", "-k", "60", "--json", *more])
        assert done.exit_code == 0, done.output
        return list(json.loads(done.stdout)["items"])

    assert [item["item_id"] for item in first()] == ids(recommender.recommend(["item-001"], 60, new_items=2.0))
    assert [item["item_id"] for item in first("--new-items", "-3")] == ids(recommender.recommend(["item-001"], 60, new_items=-3.0))
    assert not train_sbr(SETTINGS, later, later / "data").made  # no model depends on it
    assert "note: its new_items is still 2.0; run `tpad index` for sbr.new_items 0.0" in capsys.readouterr().err


def test_a_file_is_ranked_with_new_items(recommender: Recommender, tmp_path: Path) -> None:
    recommend_file(recommender, write_events(tmp_path / "s.csv"), tmp_path / "out.parquet", k=3, new_items=4.0)
    item_ids = pq.read_table(tmp_path / "out.parquet").to_pydict()["item_id"]
    sessions = (["item-011", "item-012", "item-010"], ["item-020", "item-021"], [])
    assert item_ids == [i for session in sessions for i in ids(recommender.recommend(session, 3, new_items=4.0))]


@pytest.mark.parametrize("shift", ["21", "-20.5", "nan", "inf"])
def test_new_items_out_of_range_is_one_clear_line(run: Path, shift: str) -> None:
    done = CliRunner().invoke(cli.app, ["recommend", "--run", str(run), "--session", "item-001", f"--new-items={shift}"])
    assert done.exit_code == USAGE
    assert done.stderr == f"error: --new-items {float(shift)} is not from -20 to 20; 0 leaves new items as they are\n"


# --- files


def events() -> list[tuple[str, str, int]]:
    """Two sessions interleaved and out of order, one of unknown items."""
    return [
        ("7", "item-010", 30),
        ("a", "item-020", 5),
        ("7", "item-011", 10),
        ("x", "gone", 1),
        ("a", "item-021", 6),
        ("7", "item-012", 20),
    ]


def write_events(path: Path, clock: bool = True) -> Path:
    names = ["session_id", "item_id", "timestamp"][: 3 if clock else 2]
    rows = [event[: len(names)] for event in events()]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([names, *rows])
    return path


@pytest.mark.parametrize("name", ["s.parquet", "s.csv", "s.tsv", "s.jsonl"])
def test_a_file_gets_the_rankings_of_single_sessions(recommender: Recommender, tmp_path: Path, name: str) -> None:
    summary = recommend_file(recommender, write_events(tmp_path / name), tmp_path / "out.parquet", k=3)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["session_id", "item_id", "rank", "score"]
    assert (summary.sessions, summary.popular, summary.unknown_events, summary.rows) == (3, 1, 1, 9)
    columns = table.to_pydict()
    wanted = {"7": ["item-011", "item-012", "item-010"], "a": ["item-020", "item-021"], "x": []}
    assert columns["session_id"] == [s for s in wanted for _ in range(3)]
    assert columns["rank"] == [1, 2, 3] * 3
    assert columns["item_id"] == [i for session in wanted.values() for i in ids(recommender.recommend(session, 3))]


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("s.csv", "session_id;item_id;timestamp\n007;item-010;1700000000\n007;item-011;1700000001\n", {}),
        ("s.csv", "SessionId, ItemId, Time\n007, item-011, 1700000001000\n007, item-010, 1700000000000\n", {}),
        ("s.csv", "session_id,item_id,timestamp\n007,item-011,2024-03-01 10:01:00 UTC\n007,item-010,2024-03-01 10:00:00 UTC\n", {}),
        ("s.dat", "007::item-010::5\n007::item-011::5\n", {"names": [["session_id", "item_id", "rating"]]}),
        ("s.jsonl", '{"session_id": "007", "item_id": "item-010"}\n{"session_id": "007", "item_id": "item-011"}\n', {}),
        ("s.jsonl", '{"session": "007", "events": [{"aid": "item-010", "ts": 1}, {"aid": "item-011", "ts": 2}]}\n', {"preset": "otto"}),
        (
            "s.tsv",
            "session_id\titem_id\tevent\n007\titem-010\tview\n007\titem-050\tbuy\n007\titem-011\tview\n",
            {"where": "event = 'view'"},
        ),
    ],
)
def test_what_prepare_reads_is_ranked(
    recommender: Recommender, tmp_path: Path, name: str, content: str, options: dict[str, object]
) -> None:
    (tmp_path / name).write_text(content)
    recommend_file(recommender, [tmp_path / name], tmp_path / "out.parquet", k=3, tables=TableOptions(**options))  # type: ignore[arg-type]
    ranked = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert ranked["session_id"] == ["007"] * 3
    assert ranked["item_id"] == ids(recommender.recommend(["item-010", "item-011"], 3))


def test_a_session_gets_an_answer_though_its_events_cannot_be_read(
    recommender: Recommender, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words for a missing value are missing, as in `prepare`, and said; no session is lost."""
    (tmp_path / "s.csv").write_text(
        "session_id,item_id,timestamp\na,item-010,1700000000\nb,NULL,1700000001\nnan,item-010,1700000002\nc,item-011,\n"
    )
    summary = recommend_file(recommender, tmp_path / "s.csv", tmp_path / "out.parquet", k=3)
    assert (summary.sessions, summary.popular, summary.unknown_events) == (3, 2, 2)
    assert set(pq.read_table(tmp_path / "out.parquet")["session_id"].to_pylist()) == {"a", "b", "c"}
    said = capsys.readouterr().err
    assert "1 cells say NULL, 1 cells say nan: taken as missing" in said and "dropped: 1 events without session_id" in said


@pytest.mark.parametrize("together", [True, False])
def test_a_file_larger_than_a_piece_is_read_in_pieces(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """Sessions that continue in the next pieces, or are scattered over the file, are complete, and in the order of time."""
    rng = np.random.default_rng(0)
    lengths = np.array([1, 9, 3, 1, 2, 20, 4])
    session = np.repeat(np.arange(len(lengths)), lengths)
    if not together:
        session = np.concatenate([np.arange(len(lengths)), rng.permutation(session)])  # the first appearances in order
    item, clock = rng.integers(0, 60, len(session)), rng.permutation(len(session))
    columns = {"session_id": session, "item_id": [f"item-{n:03d}" for n in item], "other": item, "timestamp": clock}
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    monkeypatch.setattr(batch, "PIECE", 4)
    summary = recommend_file(recommender, tmp_path / "s.parquet", tmp_path / "out.parquet", k=3)
    ranked = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert (summary.sessions, summary.rows) == (7, 21) and ranked["session_id"] == [str(n) for n in range(7) for _ in range(3)]
    events = [sorted((clock[event], columns["item_id"][event]) for event in np.flatnonzero(session == n)) for n in range(7)]
    assert ranked["item_id"] == [i for one in events for i in ids(recommender.recommend([item for _, item in one], 3))]


def test_the_vectors_of_sessions_are_the_queries_of_every_prefix(recommender: Recommender) -> None:
    """Also of long sessions; and a session's last query is that of the model in training."""
    long = [f"item-{n % 50:03d}" for n in range(recommender.config.max_prefix + 7)]
    sessions = [["item-010", "gone", "item-011", "item-010"], ["gone"], long]
    model = recommender.batch_scorer.model
    for session, encoded in zip(sessions, recommender.encode(sessions), strict=True):
        rows = [recommender.row[item] for item in session if item in recommender.row][-recommender.config.max_prefix :]
        assert encoded.rows.tolist() == rows and set(encoded.queries) == set(encoded.weights) == {"content", "id"}
        if rows:
            with torch.no_grad():
                state = model.encode(torch.tensor([rows]), model.tables())
            for name, queries in encoded.queries.items():
                assert queries == pytest.approx(state.queries[name][0, :, : recommender.config.dim].numpy(), abs=1e-3)
                assert encoded.weights[name] == pytest.approx(state.weights[name][0, -1].numpy(), abs=1e-3)
            prefix = recommender.encode([session[:2]])[0]  # a query depends on no later event
            if len(session) == 4:
                assert prefix.queries["id"][0] == pytest.approx(encoded.queries["id"][0], abs=1e-4)
    assert recommender.item_vectors["content"].shape == (60, recommender.config.dim)


@pytest.mark.parametrize("ranked", [True, False])
def test_a_file_of_sessions_gets_its_vectors(recommender: Recommender, tmp_path: Path, ranked: bool) -> None:
    out = tmp_path / "out.parquet" if ranked else None
    recommend_file(recommender, write_events(tmp_path / "s.csv"), out, k=3, vectors=tmp_path / "vectors.parquet")
    assert (tmp_path / "out.parquet").exists() == ranked
    table = pq.read_table(tmp_path / "vectors.parquet")
    columns = table.to_pydict()
    assert table.column_names == ["session_id", "position", "item_id", "content", "content_weight", "id", "id_weight"]
    assert columns["session_id"] == ["7", "7", "7", "a", "a"] and columns["position"] == [1, 2, 3, 1, 2]
    assert columns["item_id"] == ["item-011", "item-012", "item-010", "item-020", "item-021"]
    for session, lines in ((columns["item_id"][:3], slice(0, 3)), (columns["item_id"][3:], slice(3, 5))):
        encoded = recommender.encode([session])[0]
        for name in ("content", "id"):
            assert columns[name][lines] == encoded.queries[name].tolist()
            assert columns[f"{name}_weight"][lines] == encoded.weights[name].tolist()


def test_vectors_and_rankings_are_never_written_into_one_file_or_the_log(recommender: Recommender, tmp_path: Path) -> None:
    events = write_events(tmp_path / "s.parquet")
    before = contents(tmp_path)
    for out, vectors, said in ((tmp_path / "a", tmp_path / "a", "--out and --vectors"), (None, events, "--vectors and --sessions")):
        with pytest.raises(UserError, match=f"{said} are the same file") as error:
            recommend_file(recommender, events, out, vectors=vectors)
        assert error.value.code == USAGE
    assert contents(tmp_path) == before


def test_several_processes_share_a_file(recommender: Recommender, tmp_path: Path) -> None:
    events = write_events(tmp_path / "s.csv")
    single = recommend_file(recommender, events, tmp_path / "single.parquet", k=3)
    parts = [recommend_file(recommender, events, tmp_path / "out.parquet", k=3, share=(n, 2)) for n in (0, 1)]
    assert [part.out.name for part in parts] == ["out-00000-of-00002.parquet", "out-00001-of-00002.parquet"]
    one, other = pq.read_table(single.out).to_pydict(), pa.concat_tables([pq.read_table(part.out) for part in parts]).to_pydict()
    assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-4)
    assert one == other
    for name in ("sessions", "popular", "unknown_events", "rows"):
        assert sum(getattr(part, name) for part in parts) == getattr(single, name)


def test_an_unusable_output_path_is_refused_before_a_session_is_read(recommender: Recommender, tmp_path: Path) -> None:
    """No file is changed: neither the log itself, nor the output of another number of processes, which would duplicate each session."""
    events = write_events(tmp_path / "s.parquet")
    for n in (0, 1):
        recommend_file(recommender, events, tmp_path / "out.parquet", k=3, share=(n, 2))
    before = contents(tmp_path)
    (tmp_path / "link.parquet").symlink_to(events)
    for source, out, share, said in (
        (events, events, (0, 1), "--out and --sessions are the same file"),
        (events, tmp_path / "link.parquet", (0, 1), "--out and --sessions are the same file"),
        (tmp_path / "missing", tmp_path / "none" / "out.parquet", (0, 1), r"in a folder that does not exist \(\S+/none/out.parquet\)"),
        (tmp_path / "missing", tmp_path, (0, 1), "is a folder"),
        (events, tmp_path / "out.parquet", (1, 4), r"the folder already has the output of 2 processes \(\S+/out-00000-of-00002.parquet\)"),
    ):
        with pytest.raises(UserError, match=said) as error:
            recommend_file(recommender, source, out, share=share)
        assert error.value.code == USAGE
    (tmp_path / "link.parquet").unlink()
    assert contents(tmp_path) == before


def test_without_timestamps_the_order_is_that_of_the_file(recommender: Recommender, tmp_path: Path) -> None:
    recommend_file(recommender, write_events(tmp_path / "s.csv", clock=False), tmp_path / "out.parquet", k=3)
    item_ids = pq.read_table(tmp_path / "out.parquet").to_pydict()["item_id"][:3]
    assert item_ids == ids(recommender.recommend(["item-010", "item-011", "item-012"], 3))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("s.csv", "visit,item_id\na,b\n", "no column names the sessions or the users .*visit, item_id.*--column session_id=NAME"),
        ("s.csv", "session_id,item_id\n", "no events"),
        ("s.csv", "session_id,item_id,timestamp\na,item-001,yesterday\n", "'yesterday' is not a time .*line 2"),
        ("s.csv", "session_id,item_id,timestamp\na,item-001,1.5\na,item-002,inf\n", "a time is not finite.*line 3"),
        ("s.jsonl", '{"session_id": "a", "item_id"\n', "not valid JSON.*line 1"),
        ("s.parquet", "PAR1 not really", "not readable"),
        ("s.xlsx", "", "unknown kind of file"),
        ("missing.csv", None, "not found"),
    ],
)
def test_a_bad_file_is_one_clear_line_and_no_file_is_overwritten(
    recommender: Recommender, tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    out = tmp_path / "out.parquet"
    out.write_text("precious")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as error:
        recommend_file(recommender, tmp_path / name, out)
    assert error.value.code == DATA
    assert "\n" not in str(error.value)
    assert out.read_text() == "precious"


def test_a_run_with_other_embeddings_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    group = np.arange(60) % 6
    publish_embeddings(tmp_path / "run", tmp_path / "run" / "data", group, SETTINGS, seed=1)
    with pytest.raises(UserError, match=r"embeddings v0002 .* v0001 .* `tpad train-sbr`") as error:
        Recommender.load(tmp_path / "run")
    assert error.value.code == ARTIFACT


def test_a_damaged_file_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "index-content.faiss", "attributes.parquet", "items.parquet", "config.json"):
        folder = tmp_path / name
        shutil.copytree(run / "sbr", folder / "sbr")
        path = folder / "sbr" / "v0001" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(UserError, match=name) as error:
            Recommender.load(folder)
        assert error.value.code == ARTIFACT


def test_recommend_before_training_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tpad train-sbr") as error:
        Recommender.load(tmp_path)
    assert error.value.code == ARTIFACT


def test_a_flipped_bit_in_a_file_of_sessions_is_never_read_as_another_item(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pa.table({"session_id": [f"s{n // 4}" for n in range(400)], "item_id": [f"item-{n:03d}" for n in rng.integers(60, size=400)]})
    sound = tmp_path / "sound.parquet"
    pq.write_table(table, sound, write_page_checksum=True, compression="none", use_dictionary=False)
    data, refused = sound.read_bytes(), 0
    for place in rng.choice(len(data), 60, replace=False):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        path = tmp_path / "flipped.parquet"
        path.write_bytes(flipped)
        try:
            with database(tmp_path, None) as tables:
                log, _ = open_tables(tables, path, None, TableOptions(), Report())
                load_events(tables, log, SessionRules(), TableOptions(), Report())
                read = tables.run("select cast(g as varchar) as session_id, i as item_id from log order by rowid").to_arrow_table()
        except UserError:
            refused += 1
        else:
            assert read.to_pydict() == table.to_pydict()
    assert refused > 30
