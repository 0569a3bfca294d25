"""The index over the item vectors: a flat one is exact."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.session_models import ITEMS, random_model
from recommender.retrieval.index import ItemIndex, build_indexes, load_indexes, save_indexes
from recommender.session_model.config import ModelConfig
from recommender.session_model.model import SessionModel
from recommender.session_model.numpy_model import NumpySessionModel


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_a_product_quantizer_finds_candidates_that_the_model_scores_exactly(tmp_path: Path) -> None:
    """Also after its file was mapped; its vectors of a few bytes are no scores."""
    rng = np.random.default_rng(0)
    items, lengths = 2000, np.full(800, 4)
    rows = (np.repeat(rng.integers(items, size=800), 4) + np.tile(np.arange(4), 800)) % items
    torch.manual_seed(0)
    vectors = rng.normal(size=(20, 12))[np.arange(items) % 20] + 0.3 * rng.normal(size=(items, 12))
    model = SessionModel(ModelConfig(items, 12, True, 16), vectors.astype(np.float32), rows.astype(np.int32), np.cumsum([0, *lengths]))
    numpy_model = NumpySessionModel.of(model.eval())
    save_indexes(build_indexes(numpy_model, "IVF16,PQ36x4fs"), tmp_path)
    index = ItemIndex(load_indexes(tmp_path), numpy_model, effort=4.0)
    assert not index.exact
    assert all(found.d % 36 == 0 for found in index.indexes.values())
    hits = 0
    for session in rng.integers(items, size=(20, 3)).tolist():
        state = numpy_model.encode(session)
        wanted = numpy_model.scores(state, np.arange(items))
        values, found = index.top(state, 20)
        np.testing.assert_allclose(values, wanted[found], atol=1e-5)
        hits += int((values >= np.sort(wanted)[-20] - 1e-4).sum())
    assert hits / 400 > 0.9


@pytest.mark.parametrize("allowed", [None, np.arange(ITEMS) % 3 == 0])
def test_a_flat_index_finds_the_items_that_scoring_all_finds(allowed: np.ndarray | None) -> None:
    model = random_model()
    tables = model.tables()
    numpy_model = NumpySessionModel.of(model)
    index = ItemIndex(build_indexes(numpy_model, "flat"), numpy_model)
    assert index.exact
    index.first = 4  # short first lists, so that the search must take a larger M
    rng = np.random.default_rng(3)
    for k in (1, 5, ITEMS):
        for _ in range(20):
            session = rng.integers(0, ITEMS, size=rng.integers(1, 9)).tolist()
            values, rows = index.top(numpy_model.encode(session), k, allowed)
            wanted = model.scores(torch.tensor([session]), tables)[0].numpy()
            if allowed is not None:
                wanted[~allowed] = -np.inf
            best = np.sort(wanted)[::-1][:k]
            assert np.allclose(values, best[best > -np.inf], atol=1e-4)
            assert np.allclose(wanted[rows], values, atol=1e-4)
