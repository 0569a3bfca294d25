"""Next-item counts and co-occurrence counts: what is counted, and that a session's own pairs are left out."""

import numpy as np
import pytest
import torch

from helpers.session_models import ITEMS, training_sessions
from recommender.session_model.config import ModelConfig
from recommender.session_model.model import SessionModel
from recommender.session_model.numpy_model import NumpyPairCounts
from recommender.session_model.pair_counts import PairCounts
from recommender.session_model.windows import pack


@pytest.mark.parametrize("name", ["next_item_counts", "cooccurrence_counts"])
def test_a_session_is_no_evidence_for_itself(name: str) -> None:
    """In training, the counts for a session are those of a log without that session."""
    rows, offsets = training_sessions()
    windows = pack(rows, offsets, 8)
    tables = dict(SessionModel(ModelConfig(ITEMS, 0, True, dim=16, max_prefix=8), None, rows, offsets).pair_counts())
    for number in range(5):
        others = np.ones(len(rows), bool)
        others[offsets[number] : offsets[number + 1]] = False
        lengths = np.delete(np.diff(offsets), number)
        without = PairCounts(rows[others], np.cumsum([0, *lengths]), ITEMS, 8, tables[name].steps)
        one = windows.take(np.array([number]))
        inputs, targets = torch.tensor(one.inputs).long(), torch.tensor(one.targets).long()
        shares, weights = tables[name](inputs, targets)
        wanted = torch.zeros(len(one.inputs[0]), 1, ITEMS)
        without.add(wanted, inputs[0][:, None], torch.ones(len(one.inputs[0]), 1, 1))
        session = rows[offsets[number] : offsets[number + 1]]  # the window and the target after it
        length = len(session)
        assert torch.allclose(shares[0, : length - 1, :length], wanted[: length - 1, 0, session], atol=1e-6)
        assert torch.allclose(weights, without.weights(inputs), atol=1e-4)


def test_pairs_at_the_given_steps_inside_a_session_are_counted() -> None:
    rows, offsets = np.array([1, 2, 1, 3, 2, 3]), np.array([0, 4, 6])  # 1 2 1 3 | 2 3
    pairs = PairCounts(rows, offsets, 5, 8, [-2, 2, 1])
    counted = {(int(key) // 5, int(key) % 5): int(count) for key, count in zip(pairs.keys, pairs.counts, strict=True)}
    assert counted == {(1, 2): 1, (2, 1): 1, (1, 3): 1, (2, 3): 2, (1, 1): 2, (3, 2): 1}


def test_without_any_pair_all_shares_are_zero() -> None:
    pairs = PairCounts(np.array([0, 1]), np.array([0, 2]), 3, 8, [1])
    for key, value in pairs.over(torch.tensor([0, -1, 1]), 2).items():
        setattr(pairs, key, value)
    pairs.items = 2
    numpy_counts = NumpyPairCounts({name: tensor.numpy() for name, tensor in pairs.state_dict().items()})
    assert not numpy_counts.shares(np.array([0, 1]), np.array([0, 1])).any()
