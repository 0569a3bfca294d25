"""Tests the sample shop: which property is in image, text or log, and that the ceiling is the score of the law."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.config import DataConfig, ShopConfig
from pipeline.data.catalog import Catalog, load_catalog
from pipeline.data.sample_shop import COLOURS, LAST, MOTIFS, Law, build_law, draw_shop
from pipeline.data.session_log import load_sessions
from pipeline.data.split import split_by_time

# 2005 sessions: a tenth is 200.5 of them, so the shop and the split must round alike
SHOP = ShopConfig(items=300, sessions=2005, image_size=32)
DATA = DataConfig()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("shop")
    draw_shop(data, SHOP, DATA)
    return data


@pytest.fixture(scope="module")
def law() -> Law:
    return build_law(SHOP)


@pytest.fixture(scope="module")
def catalog(shop: Path) -> Catalog:
    return load_catalog(shop)


def test_the_same_settings_draw_the_same_files_and_another_seed_another_shop(tmp_path: Path) -> None:
    small = ShopConfig(items=40, sessions=60, image_size=24)
    for name, config in (("one", small), ("two", small), ("three", small.model_copy(update={"seed": 1}))):
        draw_shop(tmp_path / name, config, DATA)
    for file in ("items.parquet", "sessions.parquet", "ceiling.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
        assert (tmp_path / "one" / file).read_bytes() != (tmp_path / "three" / file).read_bytes()


def test_every_row_of_the_law_is_a_distribution(law: Law) -> None:
    for table in (law.before, law.after):
        assert (table >= 0).all()
        np.testing.assert_allclose(table.sum(1), 1, atol=1e-12)
    assert not law.before[:, law.cold].any()
    assert (law.after[:, law.cold].sum(0) > 0).all()


def test_cold_items_come_after_the_training_sessions(shop: Path, catalog: Catalog, law: Law) -> None:
    split = split_by_time(load_sessions(shop, catalog), DATA.valid, DATA.test)
    assert 0.1 < law.cold.mean() < 0.2
    assert not law.cold[split.train.rows].any()
    for later in (split.valid, split.test):
        assert law.cold[later.rows].mean() > 0.05


def information(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the mutual information of two columns of codes, in nats, from counts."""
    table = np.zeros((one.max() + 1, other.max() + 1))
    np.add.at(table, (one, other), 1 / len(one))
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
    return float((table[table > 0] * np.log(table[table > 0] / expected[table > 0])).sum())


def test_no_text_but_the_motif_s_own_column_tells_colour_or_motif(catalog: Catalog, law: Law) -> None:
    rng = np.random.default_rng(0)
    columns = {name: [catalog.text(row, name) for row in range(len(catalog))] for name in catalog.columns}
    columns |= {f"title word {n}": [title.split()[n] for title in catalog.titles] for n in range(3)}
    del columns["title"]  # nearly unique; its words are used instead
    assert columns.pop("motif") == [MOTIFS[m] for m in law.motif]
    codes = {name: np.unique(values, return_inverse=True)[1] for name, values in columns.items()}
    assert information(codes["kind"], law.kind) > 1  # the measure detects a real dependency
    for hidden in (law.colour, law.motif):
        for name, code in codes.items():
            chance = [information(code, rng.permutation(hidden)) for _ in range(50)]
            assert information(code, hidden) < max(chance) * 1.1, name
    words = set(re.findall(r"\w+", " ".join(text for texts in columns.values() for text in texts).lower()))
    assert not words & {*MOTIFS, "red", "orange", "yellow", "green", "turquoise", "blue", "purple", "brown"}


def test_images_show_the_colour(catalog: Catalog, law: Law) -> None:
    right = []
    for row in range(0, len(catalog), 3):
        pixels = np.asarray(catalog.image(row)).astype(int)
        product = pixels[(pixels != pixels[0, 0]).any(-1)]
        bright = product[product.sum(1).argmax()]  # between the dark lines of a motif
        right.append(np.abs(np.array(COLOURS) - bright).sum(1).argmin() == law.colour[row])
    assert np.mean(right) > 0.9


def cases(shop: Path, catalog: Catalog, law: Law) -> list[tuple[np.ndarray, int]]:
    """Returns (P(next item), next item) at every position but the first of the test sessions."""
    test = split_by_time(load_sessions(shop, catalog), DATA.valid, DATA.test).test
    result = []
    for s in range(len(test)):
        rows = test.session(s)
        for n in range(1, len(rows)):
            seen = [int(row) for row in rows[max(0, n - DATA.max_prefix) : n]]
            share = LAST if len(seen) > 1 else 1.0
            probabilities = share * law.after[seen[-1]]
            for row in seen[:-1]:
                probabilities = probabilities + (1 - share) * law.after[row] / (len(seen) - 1)
            result.append((probabilities, int(rows[n])))
    return result


def brute_rank(scores: np.ndarray, target: int) -> float:
    """Returns the rank; the mean rank for equal scores."""
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    places = [place + 1 for place, row in enumerate(order) if scores[row] == scores[target]]
    return sum(places) / len(places)


def test_the_ceiling_is_what_the_law_scores_on_the_test_sessions(shop: Path, catalog: Catalog, law: Law) -> None:
    ceiling = json.loads((shop / "ceiling.json").read_text())
    assert (ceiling["valid"], ceiling["test"], ceiling["max_prefix"]) == (DATA.valid, DATA.test, DATA.max_prefix)
    ranks = [(brute_rank(scores, target), bool(law.cold[target])) for scores, target in cases(shop, catalog, law)]
    groups = {
        "all": [rank for rank, _ in ranks],
        "warm": [rank for rank, cold in ranks if not cold],
        "cold": [rank for rank, cold in ranks if cold],
    }
    for name, mask in groups.items():
        for k in (5, 10, 20):
            hits = [rank for rank in mask if rank <= k]
            result = ceiling["metrics"][name]
            assert result[f"HR@{k}"] == pytest.approx(len(hits) / len(mask), abs=1e-9)
            assert result[f"MRR@{k}"] == pytest.approx(sum(1 / rank for rank in hits) / len(mask), abs=1e-9)
            assert result[f"NDCG@{k}"] == pytest.approx(sum(1 / np.log2(1 + rank) for rank in hits) / len(mask), abs=1e-9)


def test_the_log_follows_the_law(shop: Path, catalog: Catalog, law: Law) -> None:
    """The law's ten best items contain the next one as often as its probabilities say."""
    hits, promised = [], []
    for scores, target in cases(shop, catalog, law):
        best = np.argsort(-scores)[:10]
        hits.append(target in best)
        promised.append(scores[best].sum())
    deviation = np.sqrt(np.mean(promised) * (1 - np.mean(promised)) / len(hits))
    assert abs(np.mean(hits) - np.mean(promised)) < 4 * deviation
