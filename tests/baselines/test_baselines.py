"""The baselines against plain-Python versions of their definitions."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from recommender.baselines import counts, nearest_sessions, registry
from recommender.metrics.ranks import target_ranks
from recommender.session_model.windows import PAD, pad_prefixes

ITEMS = 25


def sessions(count: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, ITEMS - 3, size=rng.integers(2, 9)).tolist() for _ in range(count)]


def flat(log: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(log).astype(np.int32), np.cumsum([0, *map(len, log)])


def test_popularity_counts_training_events() -> None:
    log = sessions()
    scores = counts.popularity(flat(log)[0], ITEMS)(pad_prefixes([[1], [2, 3]], 4))
    assert scores.shape == (2, ITEMS)
    assert scores[0].tolist() == scores[1].tolist() == [sum(s.count(i) for s in log) for i in range(ITEMS)]


def test_co_occurrence_counts_direct_successors() -> None:
    log = sessions()
    scores = counts.co_occurrence(*flat(log), ITEMS)(pad_prefixes([[4, 7], [7, 4, 9]], 4))
    for line, last in zip(scores, (7, 9), strict=True):
        for item in range(ITEMS):
            wanted = sum((a, b) == (last, item) for s in log for a, b in pairwise(s))
            assert np.isclose(line[item], wanted, atol=0.01)


def test_last_item_repeat_ranks_the_latest_first() -> None:
    line = counts.last_item_repeat(flat(sessions())[0], ITEMS)(pad_prefixes([[5, 6, 5, 8]], 4))[0]
    assert np.argsort(-line)[:3].tolist() == [8, 5, 6]


def test_nearest_sessions_weigh_by_similarity() -> None:
    log = sessions()
    prefix = [3, 11, 3]
    line = nearest_sessions.session_knn(*flat(log), ITEMS, neighbours=1000, recent=1000)(np.array([[*prefix, PAD]]))[0]
    wanted = np.zeros(ITEMS)
    for session in log:
        overlap = len(set(session) & set(prefix))
        wanted[list(set(session))] += overlap / np.sqrt(len(set(prefix)) * len(set(session)))
    assert np.allclose(line, wanted, atol=0.01)


def test_nearest_sessions_prefer_recent_ones() -> None:
    log = [[0, 1], [0, 2], [0, 3]]
    line = nearest_sessions.session_knn(*flat(log), ITEMS, neighbours=100, recent=1)(np.array([[0]]))[0]
    assert line[3] > 0.4
    assert line[1] < 0.01


def test_session_popularity_counts_in_the_session() -> None:
    line = counts.session_popularity(flat(sessions())[0], ITEMS)(pad_prefixes([[5, 6, 5, 8, 6, 5]], 8))[0]
    assert line[[5, 6, 8]].round().tolist() == [3, 2, 1]
    assert np.argsort(-line)[:3].tolist() == [5, 6, 8]


def test_the_vectors_of_vsknn_count_late_items_more() -> None:
    """Worked example, prefix (0, 1, 2, 1): the weights are 1/4 of item 0, 3/4 of item 2, and 1 of item 1, by its last position."""
    log = [[0, 10], [1, 11], [2, 12], [0, 2, 13], [5, 14]]
    line = nearest_sessions.vector_knn(*flat(log), ITEMS)(pad_prefixes([[0, 1, 2, 1]], 8))[0]
    wanted = {
        10: 0.25 / 4,
        11: 1.0,
        12: 0.75 / 2,
        13: (0.25 + 0.75) / 2,
        14: 0.0,
    }  # shared weight over the steps back to the last shared item
    assert line[list(wanted)] == pytest.approx(list(wanted.values()), abs=0.002)
    line = nearest_sessions.vector_knn(*flat(log), ITEMS, neighbours=2)(pad_prefixes([[0, 1, 2, 1]], 8))[0]
    assert np.flatnonzero(line[10:15] > 0.01).tolist() == [1, 3]  # the two sessions with a shared weight of 1


@pytest.mark.parametrize("name", registry.BASELINES)
def test_ranks_are_those_of_the_scores(name: str) -> None:
    scorer = registry.BASELINES[name](*flat(sessions()), ITEMS)
    rng = np.random.default_rng(1)
    prefixes = pad_prefixes([rng.integers(0, ITEMS, size=rng.integers(1, 9)).tolist() for _ in range(200)], 8)
    targets = rng.integers(0, ITEMS, size=200)
    scores = scorer(prefixes)
    wanted = target_ranks(torch.as_tensor(scores), torch.as_tensor(targets))
    assert scorer.ranks(prefixes, targets).tolist() == wanted.tolist()
    for k in (1, 20, ITEMS):
        assert scorer.top(prefixes, k).tolist() == np.argsort(-scores, axis=1, kind="stable")[:, :k].tolist()
