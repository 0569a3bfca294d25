"""Tests the protocols of splitting; artifacts of another split are refused, and every command obeys the setting."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.fake_embeddings import publish_embeddings, write_data
from helpers.runs import distill_run, export_run, same, weights
from helpers.session_logs import log_of
from pipeline.core.config import Config, DataConfig
from pipeline.core.config_file import load_config
from pipeline.core.errors import ARTIFACT, DATA, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import read_embeddings
from pipeline.data.session_log import SessionLog, load_sessions
from pipeline.data.split import split_by_time, split_sessions
from recommender.metrics.evaluator import positions_of
from recommender.session_model.windows import PAD, cases_of, prefixes_of
from recommender.training.dataset import load_training_data
from recommender.training.train import train_sbr


def refused(action: Callable[[], object], *words: str) -> None:
    with pytest.raises(UserError) as error:
        action()
    assert error.value.code == DATA
    assert all(word in str(error.value) for word in words), str(error.value)


def test_split_is_by_start_and_complete() -> None:
    split = split_by_time(log_of(100), valid=0.1, test=0.2)
    assert [len(part) for part in (split.train, split.valid, split.test)] == [70, 10, 20]
    assert split.train.start.max() < split.valid.start.min() and split.valid.start.max() < split.test.start.min()
    assert [len(part) for part in vars(split_by_time(log_of(3), 0.1, 0.1)).values()] == [1, 1, 1]


@pytest.mark.parametrize(("count", "valid", "test"), [(2, 0.1, 0.1), (100, 0.0, 0.1), (100, 0.5, 0.5)])
def test_split_without_a_part_is_refused(count: int, valid: float, test: float) -> None:
    refused(lambda: split_by_time(log_of(count), valid, test), f"{count} sessions", "data.valid")


def test_a_user_is_in_one_part_and_stays_there_as_the_log_grows() -> None:
    settings = DataConfig(protocol="user-hash", valid=0.2, test=0.2)
    small, large = (split_sessions(log_of(count, users=300), settings) for count in (300, 1200))
    sides = [{"train": part.train, "valid": part.valid, "test": part.test} for part in (small, large)]
    users = [{name: set(part.users) for name, part in parts.items()} for parts in sides]
    assert users[0] == users[1]
    assert sum(map(len, users[0].values())) == 300  # no user twice
    assert 0.1 < len(users[0]["test"]) / 300 < 0.3 and 0.1 < len(users[0]["valid"]) / 300 < 0.3
    assert sum(map(len, sides[1].values())) == 1200
    assert all(np.all(np.diff(part.start) > 0) for part in sides[1].values())
    without = split_sessions(log_of(1200), settings)  # no users: by session
    assert 0.15 < len(without.test) / 1200 < 0.25


def test_last_out_holds_out_one_item_of_each_session() -> None:
    rows = np.array([*range(10, 16), *range(20, 24), *range(30, 33), *range(40, 42)], np.int32)
    log = SessionLog(["a", "b", "c", "d"], rows, np.array([0, 6, 10, 13, 15]), np.arange(4), np.arange(15))
    split = split_sessions(log, DataConfig(protocol="last-out"))
    split_rows = [[part.session(i).tolist() for i in range(len(part))] for part in (split.train, split.valid, split.test)]
    assert split_rows[0] == [[10, 11, 12, 13], [20, 21]]
    assert split_rows[1] == [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31]]
    assert split_rows[2] == [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23], [30, 31, 32], [40, 41]]
    windows = cases_of(split.test, max_prefix=3)
    prefixes, targets = prefixes_of(windows)
    assert [p[p != PAD].tolist() for p in prefixes] == [[12, 13, 14], [20, 21, 22], [30, 31], [40]]
    assert targets.tolist() == [15, 23, 32, 41]
    session, position = positions_of(windows, split.test)
    assert session.tolist() == [0, 1, 2, 3] and position.tolist() == [5, 3, 2, 1]
    gone = np.arange(50)
    gone[15] = -1  # removed from the catalogue: 14 must not become the test target, since it was the validation target
    assert [split.test.moved(gone).session_ids, split.valid.moved(gone).session_ids] == [["b", "c", "d"], ["a", "b", "c"]]
    gone[13] = -1  # the last training item of a: the items before it are still trained on
    remaining = split.train.moved(gone, training=True)
    assert [remaining.session(i).tolist() for i in range(len(remaining))] == [[10, 11, 12], [20, 21]]
    refused(lambda: split_sessions(log_of(9, length=3), DataConfig(protocol="last-out")), "four events", "data.protocol")


def test_positions_are_those_of_the_targets() -> None:
    log = log_of(5, length=9)
    session, position = positions_of(cases_of(log, max_prefix=4), log)
    assert session.tolist() == [n for n in range(5) for _ in range(8)]
    assert position.tolist() == list(range(1, 9)) * 5


def settings(protocol: str) -> Config:
    return load_config(None, ["sbr.dim=8", "sbr.epochs=1", "sbr.models=[full]", f"data.protocol={protocol}"])


@pytest.mark.parametrize("protocol", ["user-hash", "last-out"])
def test_vectors_of_one_protocol_are_refused_under_another(tmp_path: Path, protocol: str) -> None:
    data = tmp_path / "data"
    publish_embeddings(tmp_path, data, write_data(data), settings("time"))
    with pytest.raises(UserError, match=r"other training sessions.*data\.protocol") as error:
        train_sbr(settings(protocol), tmp_path, data)
    assert error.value.code == ARTIFACT


def test_the_protocol_is_obeyed_from_the_distillation_on(tiny_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    protocol = "data.protocol=last-out"
    distill_run(tmp_path, tiny_data, protocol)
    export_run(tmp_path, tiny_data, protocol)
    assert not same(weights(tmp_path), weights(tiny_run))
    full_log = load_sessions(tiny_data, load_catalog(tiny_data))
    train = split_sessions(full_log, settings("last-out").data).train
    assert read_embeddings(tmp_path / "embeddings").version.manifest["sessions_sha256"] == train.ids_sha256()
    for run, other in ((tmp_path, "time"), (tiny_run, "last-out")):
        with pytest.raises(UserError, match=r"other training sessions.*data\.protocol"):
            train_sbr(settings(other), run, tiny_data)


def test_vectors_of_shortened_sessions_are_not_those_of_whole_ones(tmp_path: Path) -> None:
    """Under last-out all parts may have the same session ids, so the hash covers the protocol too."""
    log = log_of(20, length=6)
    assert split_sessions(log, DataConfig(protocol="last-out")).train.session_ids == log.session_ids
    assert split_sessions(log, DataConfig(protocol="last-out")).train.ids_sha256() != log.ids_sha256()


def test_a_run_under_last_out_has_one_case_a_session(tmp_path: Path) -> None:
    data = tmp_path / "data"
    publish_embeddings(tmp_path, data, write_data(data), settings("last-out"))
    split_rows = train_sbr(settings("last-out"), tmp_path, data)
    ranks = pq.read_table(split_rows.version.path / "ranks.parquet").to_pylist()
    log = pq.read_table(data / "sessions.parquet").to_pylist()
    last = {event["session_id"]: event["item_id"] for event in log}
    assert {line["session_id"]: line["item_id"] for line in ranks} == last
    assert len(ranks) == len(last) == split_rows.metrics["facts"]["test_sessions"]


def test_sessions_of_a_user_column_stay_together(tmp_path: Path) -> None:
    data = tmp_path / "data"
    publish_embeddings(tmp_path, data, write_data(data), settings("user-hash"))
    log = pq.read_table(data / "sessions.parquet")
    users = [f"u{int(name[1:]) % 90}" for name in log["session_id"].to_pylist()]
    pq.write_table(log.append_column("user_id", pa.array(users)), data / "sessions.parquet")
    split = split_sessions(load_sessions(data, load_catalog(data)), settings("user-hash").data)
    user_ids = [{f"u{int(name[1:]) % 90}" for name in part.session_ids} for part in (split.train, split.valid, split.test)]
    assert sum(map(len, user_ids)) == 90
    with pytest.raises(UserError, match="other training sessions"):  # they were distilled from a split by session
        load_training_data(settings("user-hash"), tmp_path, data)


def test_cold_items_are_in_the_test_alone(tmp_path: Path) -> None:
    """A tenth of the items, the same however the log or the catalogue grows; the sessions are split as by user-hash."""
    items = [f"item-{n:03d}" for n in range(200)]
    rng = np.random.default_rng(0)
    rows = rng.integers(200, size=(300, 6)).astype(np.int32)
    log = SessionLog([f"s{n}" for n in range(300)], rows.ravel(), np.arange(301) * 6, np.arange(300), np.arange(1800), item_ids=items)
    split, whole = (split_sessions(log, DataConfig(protocol=protocol)) for protocol in ("cold-items", "user-hash"))
    trained = set(split.train.rows) | set(split.valid.rows)
    cold = (set(whole.train.rows) | set(whole.valid.rows)) - trained
    assert 10 <= len(cold) <= 32
    assert cold & set(split.test.rows)
    assert np.array_equal(split.test.rows, whole.test.rows)
    kept = [row for row in whole.train.rows if row not in cold]
    assert len(split.train.rows) >= len(kept) - 6  # nothing else is withheld, but sessions of one event that are left
    assert split.train.ids_sha256() != whole.train.ids_sha256()
    half = np.array([n if n < 100 else -1 for n in range(200)])
    smaller = split_sessions(replace(log.moved(half), item_ids=items[:100]), DataConfig(protocol="cold-items"))
    assert set(range(100)) - set(smaller.train.rows) - set(smaller.valid.rows) >= {row for row in cold if row < 100}


def test_vectors_that_have_seen_the_withheld_items_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    publish_embeddings(tmp_path, data, write_data(data), settings("user-hash"))
    with pytest.raises(UserError, match=r"other training sessions.*data\.protocol"):
        train_sbr(settings("cold-items"), tmp_path, data)
