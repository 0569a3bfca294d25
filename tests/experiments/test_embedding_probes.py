"""Tests that the probes find planted structure in vectors, and none in noise."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.fake_embeddings import write_data
from pipeline.data.catalog import load_catalog
from recommender.experiments.embedding_probes import accuracy, attribute_columns, club_a_dimension, linear_cka, retrieval_ranks
from recommender.metrics.ranks import summarise
from recommender.session_model.windows import pack

RNG = np.random.default_rng(0)


def test_a_linear_probe_reads_a_planted_attribute() -> None:
    colour = RNG.integers(4, size=400)
    words = [("red", "green", "blue", "")[c] for c in colour]  # the last: no value
    vectors = np.eye(4)[colour] @ RNG.normal(size=(4, 16)) + 0.2 * RNG.normal(size=(400, 16))
    assert accuracy(vectors, words) > 0.95
    assert accuracy(RNG.normal(size=(400, 16)), words) < 0.55


def test_cka_sees_rotations_as_equal_and_noise_as_other() -> None:
    x = RNG.normal(size=(500, 8))
    rotation = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert linear_cka(x, RNG.normal(size=(500, 8))) < 0.1


def test_the_club_bound_rises_with_shared_information_and_is_reproducible() -> None:
    x, noise = RNG.normal(size=(600, 8)), RNG.normal(size=(600, 8))
    apart, near, same = (club_a_dimension(x, share * x + (1 - share) * noise) for share in (0.0, 0.5, 0.8))
    assert abs(apart) < 0.1
    assert same > near > 0.3
    assert club_a_dimension(x, 0.5 * x + 0.5 * noise) == near


def test_retrieval_ranks_the_next_item_by_the_last_one_and_never_the_last_one_itself() -> None:
    angle = np.linspace(0, np.pi, 30)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    rows = np.array([9, 20, 3, 4, 15, 16])
    test = pack(rows, np.array([0, 4, 6]), max_prefix=20)
    ranks = retrieval_ranks(circle, test)
    unit = [sorted(set(range(30)) - {last}, key=lambda item: -(circle[item] @ circle[last])) for last in (9, 20, 3, 15)]
    for rank, order, target in zip(ranks, unit, (20, 3, 4, 16), strict=True):
        assert rank == pytest.approx(1 + order.index(target), abs=0.5)  # neighbours left and right tie
    assert summarise(ranks)["HR@5"] == 0.5


def test_attributes_are_the_columns_of_few_values(tmp_path) -> None:
    write_data(tmp_path)
    catalog = load_catalog(tmp_path)
    assert attribute_columns(catalog, None) == ["colour", "tags"]  # titles are all different
    assert attribute_columns(catalog, ["title"]) == []
    items = pq.read_table(tmp_path / "items.parquet")
    rare = pa.array(["one", "two", *[None] * (len(items) - 2)], pa.string())  # too few to learn from, however many items there are
    pq.write_table(items.append_column("rare", rare), tmp_path / "items.parquet")
    assert attribute_columns(load_catalog(tmp_path), ["rare"]) == []
