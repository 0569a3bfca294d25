"""The index over the item vectors: a flat one is exact."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from helpers.session_models import ITEMS, random_model
from recommender.retrieval.index import ItemIndex, build_indexes
from recommender.session_model.numpy_model import NumpySessionModel


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


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
