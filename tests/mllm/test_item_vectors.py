"""Vectors of the user's own as the backbone: from a table and a click log to recommendations."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.fake_embeddings import GROUPS, write_data
from helpers.runs import distill_run, export_run, settings
from pipeline.core.errors import DATA, UserError
from pipeline.data.embeddings import read_embeddings
from pipeline.export.export import export
from recommender.serving.recommender import Recommender
from recommender.training.train import train_sbr

ITEMS, WIDTH = 60, 24


def vectors_of(group: np.ndarray, seed: int = 0) -> np.ndarray:
    """The group of each item in six numbers, beside louder ones that say nothing."""
    rng = np.random.default_rng(seed)
    said = np.eye(GROUPS)[group] + 0.05 * rng.normal(size=(len(group), GROUPS))
    return np.concatenate([said, rng.normal(size=(len(group), WIDTH - GROUPS))], axis=1).astype(np.float32)


def write_table(path: Path, item_ids: list[str], vectors: np.ndarray) -> Path:
    pq.write_table(pa.table({"item_id": item_ids, "embedding": list(vectors)}), path)
    return path


def item_ids(data: Path) -> list[str]:
    ids: list[str] = pq.read_table(data / "items.parquet")["item_id"].to_pylist()
    return ids


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("vectors")
    group = write_data(folder / "data", ITEMS)
    ids = item_ids(folder / "data")
    order = np.random.default_rng(3).permutation(ITEMS)  # a table need not have the catalogue's order
    write_table(folder / "own.parquet", [ids[n] for n in order], vectors_of(group)[order])
    return folder, group


def words(path: Path, *more: str) -> list[str]:
    return ["backbone.name=vectors", f"backbone.path={path}", "distill.transfer.steps=30", "distill.transfer.batch=64", *more]


@pytest.fixture(scope="module")
def run(place: tuple[Path, np.ndarray]) -> Path:
    folder, _ = place
    distill_run(folder / "run", folder / "data", *words(folder / "own.parquet"))
    export_run(folder / "run", folder / "data", *words(folder / "own.parquet"))
    return folder / "run"


def neighbours(vectors: np.ndarray, group: np.ndarray) -> float:
    """The share of each item's five nearest that are of its own group."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -2)
    return float((group[np.argsort(-scores, axis=1)[:, :5]] == group[:, None]).mean())


def test_the_transition_half_sees_what_matters_for_what_follows(run: Path, place: tuple[Path, np.ndarray]) -> None:
    """Of the new items too, which no session holds."""
    _, group = place
    halves = read_embeddings(run / "embeddings").vectors
    own = neighbours(vectors_of(group), group)
    assert neighbours(halves["transition"], group) > max(0.7, own + 0.2)
    cold = np.arange(ITEMS) >= ITEMS - 8
    unit = halves["transition"] / np.linalg.norm(halves["transition"], axis=1, keepdims=True)
    best = group[np.flatnonzero(~cold)][np.argsort(-(unit[cold] @ unit[~cold].T), axis=1)[:, :5]]
    assert (best == group[cold][:, None]).mean() > 0.7


def test_recommendations_in_three_commands(run: Path, place: tuple[Path, np.ndarray]) -> None:
    folder, _ = place
    train_sbr(settings(*words(folder / "own.parquet"), "sbr.epochs=2", "sbr.models=[full]", "sbr.refit=false"), run, folder / "data")
    answer = Recommender.load(run).recommend(["item-000", "item-007"], k=5)
    assert len(answer.items) == 5


def test_new_items_need_new_vectors_and_no_new_training(run: Path, place: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, group = place
    data = tmp_path / "data"
    data.mkdir()
    table = pq.read_table(folder / "data" / "items.parquet")
    more = table.slice(0, 2).set_column(0, "item_id", pa.array(["new-0", "new-1"]))
    pq.write_table(pa.concat_tables([table, more]), data / "items.parquet")
    (data / "sessions.parquet").write_bytes((folder / "data" / "sessions.parquet").read_bytes())
    before = read_embeddings(run / "embeddings").vectors["transition"]
    with pytest.raises(UserError, match=r"2 of 62 items have no vector, e\.g\. item_id 'new-0'") as error:
        export(settings(*words(folder / "own.parquet")), run, data, update=True)
    assert error.value.code == DATA
    grown = np.concatenate([vectors_of(group), vectors_of(group)[:2]])
    path = write_table(tmp_path / "grown.parquet", item_ids(data), grown)
    done = export(settings(*words(path)), run, data, update=True)
    assert done.work.items == 2
    after = read_embeddings(run / "embeddings").vectors["transition"]
    assert np.array_equal(after[:ITEMS], before)
    np.testing.assert_allclose(after[ITEMS:], before[:2], atol=1e-6)


def test_a_changed_table_is_exported_again(run: Path, place: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, group = place
    changed = vectors_of(group)
    changed[5] = changed[6]
    path = write_table(tmp_path / "changed.parquet", item_ids(folder / "data"), changed)
    done = export(settings(*words(path)), run, folder / "data")
    assert done.made
    vectors = read_embeddings(run / "embeddings").vectors["knowledge"]
    np.testing.assert_allclose(vectors[5], vectors[6], atol=1e-6)
    assert not export(settings(*words(path)), run, folder / "data").made
    export(settings(*words(folder / "own.parquet")), run, folder / "data")


def test_without_training_there_is_the_closed_form(place: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, group = place
    distill_run(tmp_path, folder / "data", *words(folder / "own.parquet", "distill.variant=closed_form"))
    export_run(tmp_path, folder / "data", *words(folder / "own.parquet"))
    halves = read_embeddings(tmp_path / "embeddings").vectors
    assert neighbours(halves["transition"], group) > 0.7
    assert not (tmp_path / "distill" / "metrics.jsonl").exists()  # of training steps


def test_numpy_files_give_the_same(run: Path, place: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    folder, group = place
    np.save(tmp_path / "own.npy", vectors_of(group))
    (tmp_path / "own.txt").write_text("\n".join(item_ids(folder / "data")) + "\n")
    distill_run(tmp_path / "run", folder / "data", *words(tmp_path / "own.npy"))
    export_run(tmp_path / "run", folder / "data", *words(tmp_path / "own.npy"))
    one, other = (read_embeddings(r / "embeddings").vectors["transition"] for r in (run, tmp_path / "run"))
    np.testing.assert_array_equal(one, other)


Break = Callable[[Path, list[str], np.ndarray], Path]


def not_finite(path: Path, ids: list[str], vectors: np.ndarray) -> Path:
    vectors[7, 3] = np.nan
    return write_table(path, ids, vectors)


def twice(path: Path, ids: list[str], vectors: np.ndarray) -> Path:
    return write_table(path, [ids[0], *ids[:-1]], vectors)


def of_two_lengths(path: Path, ids: list[str], vectors: np.ndarray) -> Path:
    pq.write_table(pa.table({"item_id": ids, "v": [list(v[: 5 + n % 2]) for n, v in enumerate(vectors)]}), path)
    return path


def without_ids(path: Path, ids: list[str], vectors: np.ndarray) -> Path:
    pq.write_table(pa.table({"id": ids, "v": list(vectors)}), path)
    return path


def cut_short(path: Path, ids: list[str], vectors: np.ndarray) -> Path:
    write_table(path, ids, vectors)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def a_pickle(path: Path, ids: list[str], vectors: np.ndarray) -> Path:
    path = path.with_suffix(".npy")
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    path.with_suffix(".txt").write_text("a\n")
    return path


def no_file(path: Path, ids: list[str], vectors: np.ndarray) -> Path:
    return path


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (not_finite, r"the vector of item_id 'item-007' has a number that is not finite"),
        (twice, r"item_id 'item-000' is duplicated"),
        (of_two_lengths, r"the vectors of `v` differ in length .*\[5, 6\]"),
        (without_ids, r"has `item_id` and one column of lists of numbers .* has id, v"),
        (cut_short, r"not readable as Parquet"),
        (a_pickle, r"cannot read the vectors: .*allow_pickle"),
        (no_file, r"no such table of vectors"),
    ],
)
def test_a_bad_table_is_one_clear_line(place: tuple[Path, np.ndarray], tmp_path: Path, broken: Break, says: str) -> None:
    folder, group = place
    path = broken(tmp_path / "bad.parquet", item_ids(folder / "data"), vectors_of(group))
    with pytest.raises(UserError, match=says) as error:
        distill_run(tmp_path / "run", folder / "data", *words(path))
    assert error.value.code == DATA
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (["backbone.name=vectors"], "path: FILE"),
        (["backbone.path=x.parquet"], "go together"),
        (["backbone.name=vectors", "backbone.path=x.parquet", "backbone.lora.rank=2"], "no layers"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        settings(*setting)
