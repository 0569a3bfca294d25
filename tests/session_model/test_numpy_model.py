"""Compares the numpy form of the session model, which serves, with the PyTorch form, which is trained and evaluated."""

import numpy as np
import pytest
import torch

from helpers.session_models import ITEMS, random_model
from recommender.session_model.config import LEAST_MASS, Parts
from recommender.session_model.numpy_model import NumpySessionModel
from recommender.session_model.windows import pad_prefixes

VERSIONS = pytest.mark.parametrize(("content", "ids"), [(True, True), (True, False), (False, True)])


@VERSIONS
@pytest.mark.parametrize("left_out", [[], ["graph", "attention", "followers", "companions", "repeat", "popularity"]])
def test_both_forms_give_the_same_scores(content: bool, ids: bool, left_out: list[str]) -> None:
    """The numpy scores are those of PyTorch, and the masses by origin add up to them."""
    model = random_model(content, ids, Parts(**dict.fromkeys(left_out, False)))
    tables, items = model.tables(), np.array([2, 9, 30, 48])  # in none of the sessions
    numpy_model = NumpySessionModel.of(model)
    for session in ([3], [5, 5, 7, 11, 3, 7], [7, 49, 7], list(range(10, 22))):  # 49 is cold; 12 items are more than max_prefix
        wanted = model.scores(torch.tensor(pad_prefixes([session], 8)).long(), tables)[0].detach().numpy()
        state = numpy_model.encode(session)
        assert np.allclose(numpy_model.scores(state, np.arange(ITEMS)), wanted, atol=1e-4)
        assert np.allclose(numpy_model.scores(state, items), wanted[items], atol=1e-4)
        masses = numpy_model.origins(state, items, numpy_model.shares(state, items))
        assert len(masses) == len(session[-8:]) + 1
        assert np.allclose(np.log(np.maximum(masses.sum(0), LEAST_MASS)), wanted[items], atol=1e-4)


def test_an_oversized_scale_still_ranks() -> None:
    """exp of a logit above 88 overflows float32, and items with infinite masses would be tied: the scale is clamped."""
    model = random_model()
    with torch.no_grad():
        for channel in model.channels.values():
            channel.log_scale.fill_(6.0)
    tables = model.tables()
    scores = model.scores(torch.tensor([[3, 7, 12]]), tables)[0].detach().numpy()
    assert np.isfinite(scores).all()
    assert len(np.unique(scores.round(3))) > ITEMS / 2
    numpy_model = NumpySessionModel.of(model)
    assert np.allclose(numpy_model.scores(numpy_model.encode([3, 7, 12]), np.arange(ITEMS)), scores, atol=1e-3)
