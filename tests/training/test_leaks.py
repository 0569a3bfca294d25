"""Tests against leaks: a planted leak is refused, and the content of test sessions changes no bit of a model."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.fake_embeddings import publish_embeddings, write_data
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.data.catalog import load_catalog
from pipeline.data.session_log import load_sessions
from pipeline.data.split import split_sessions
from recommender.baselines.registry import MODELS
from recommender.training.dataset import load_training_data
from recommender.training.train import train_sbr
from recommender.training.trainer import build_model


def settings(*more: str) -> Config:
    return load_config(None, ["sbr.dim=8", "sbr.epochs=1", "sbr.models=[full]", *more])


@pytest.mark.parametrize("other", [("data.test=0.02", "data.valid=0.02"), ("data.test=0.2",)], ids=["has seen the test", "another split"])
def test_embeddings_distilled_on_another_split_are_refused(tmp_path: Path, other: tuple[str, ...]) -> None:
    data = tmp_path / "data"
    publish_embeddings(tmp_path, data, write_data(data), settings(*other))  # whose manifest tells what they have seen
    with pytest.raises(UserError, match="other training sessions") as error:
        train_sbr(settings(), tmp_path, data)
    assert error.value.code == ARTIFACT
    assert not (tmp_path / "sbr").exists()
    assert train_sbr(settings(*other), tmp_path, data).made


def test_a_test_session_moved_into_training_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    publish_embeddings(tmp_path, data, write_data(data), settings())
    log = pq.read_table(data / "sessions.parquet")
    time = log["timestamp"].to_numpy().copy()
    last = np.array(log["session_id"].to_pylist()) == log["session_id"][-1].as_py()
    time[last] -= time[last].min() - time.min() + 1  # the newest session pretends to be the oldest
    pq.write_table(log.set_column(log.schema.get_field_index("timestamp"), "timestamp", pa.array(time)), data / "sessions.parquet")
    with pytest.raises(UserError, match="other training sessions"):
        train_sbr(settings(), tmp_path, data)


def test_other_held_out_sessions_change_no_count_no_whitening_no_graph_and_no_weight(tmp_path: Path) -> None:
    group = write_data(tmp_path / "one")
    log = pq.read_table(tmp_path / "one" / "sessions.parquet")
    split = split_sessions(load_sessions(tmp_path / "one", load_catalog(tmp_path / "one")), settings().data)
    late = set(split.test.session_ids)
    items = [
        f"item-{59 - int(item[5:]):03d}" if session in late else item
        for session, item in zip(log["session_id"].to_pylist(), log["item_id"].to_pylist(), strict=True)
    ]
    (tmp_path / "two").mkdir()
    pq.write_table(pq.read_table(tmp_path / "one" / "items.parquet"), tmp_path / "two" / "items.parquet")
    pq.write_table(log.set_column(log.schema.get_field_index("item_id"), "item_id", pa.array(items)), tmp_path / "two" / "sessions.parquet")
    builds = []
    for name in ("one", "two"):
        publish_embeddings(tmp_path / f"run-{name}", tmp_path / name, group, settings())
        builds.append(load_training_data(settings(), tmp_path / f"run-{name}", tmp_path / name))
    one, two = builds
    assert not np.array_equal(one.split.test.rows, two.split.test.rows)
    assert one.fingerprint != two.fingerprint  # the results are of other sessions
    np.testing.assert_array_equal(one.counts, two.counts)
    np.testing.assert_array_equal(one.content, two.content)
    for half, whitening in one.whitening.items():
        np.testing.assert_array_equal(whitening.mean, two.whitening[half].mean)
        np.testing.assert_array_equal(whitening.axes, two.whitening[half].axes)
    for name in MODELS:  # the graph of followers, log-counts and who is known are buffers
        states = [build_model(name, 0, settings(), inputs).state_dict() for inputs in builds]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    torch.set_num_threads(1)
    held_out = settings("sbr.refit=false")  # what is refitted has seen the test sessions, and no figure is made with it
    published = [train_sbr(held_out, tmp_path / f"run-{name}", tmp_path / name).version.path for name in ("one", "two")]
    weights = [(path / "model.safetensors").read_bytes() for path in published]
    assert weights[0] == weights[1]
    assert (published[0] / "ranks.parquet").read_bytes() != (published[1] / "ranks.parquet").read_bytes()
