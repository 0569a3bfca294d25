"""The baselines against plain-Python versions of their definitions."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from recommender.baselines import counts, nearest_sessions, ppmi, registry, stan
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
    scores = counts.popularity(*flat(log), ITEMS)(pad_prefixes([[1], [2, 3]], 4))
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
    line = counts.last_item_repeat(*flat(sessions()), ITEMS)(pad_prefixes([[5, 6, 5, 8]], 4))[0]
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
    line = counts.session_popularity(*flat(sessions()), ITEMS)(pad_prefixes([[5, 6, 5, 8, 6, 5]], 8))[0]
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


PREFIXES = [[3, 11, 3, 7], [5], [2, 2, 9, 14, 2, 6, 1], [8, 4]]


def test_sf_sknn_scores_only_what_directly_followed_the_last_item() -> None:
    log = sessions()
    every = nearest_sessions.session_knn(*flat(log), ITEMS, neighbours=15, recent=30)(pad_prefixes(PREFIXES, 8))
    filtered = nearest_sessions.sequential_filter_knn(*flat(log), ITEMS, neighbours=15, recent=30)(pad_prefixes(PREFIXES, 8))
    for prefix, line, all_scores in zip(PREFIXES, filtered, every, strict=True):
        followers = {b for s in log for a, b in pairwise(s) if a == prefix[-1]}
        for item in range(ITEMS):
            if item in followers:
                assert line[item] == all_scores[item]
            else:
                assert line[item] < 0.01


def plain_stan(log: list[list[int]], starts: list[int], prefix: list[int], settings: dict) -> dict[int, float]:
    """STAN and VSTAN as the papers' authors define them, session by session and item by item."""
    place = {item: n for n, item in enumerate(prefix, 1)}
    weight = {item: math.exp((n - len(prefix)) / settings["position_decay"]) for item, n in place.items()}
    shared = [s for s in range(len(log)) if set(log[s]) & set(prefix)][-settings["recent"] :]
    similarity = {}
    for s in shared:
        overlap = sum(weight[item] for item in set(log[s]) & set(prefix))
        similarity[s] = overlap / math.sqrt(sum(w * w for w in weight.values()) * len(set(log[s])))
        similarity[s] *= math.exp(-(max(starts) - starts[s]) / (settings["session_decay"] * (max(starts) - min(starts))))
    events, scores = Counter(item for session in log for item in session), Counter()
    for s in sorted(similarity, key=lambda s: (-similarity[s], -s))[: settings["neighbours"]]:
        last = {item: n for n, item in enumerate(log[s], 1)}
        last_shared = max(last[item] for item in last if item in place)
        steps_back = len(prefix) - max(place[item] for item in place if item in last)
        for item, n in last.items():
            score = similarity[s] * math.exp(-abs(n - last_shared) / settings["item_decay"])
            if "idf" in settings:
                score *= math.exp(-steps_back / settings["shared_decay"]) * (
                    1 + settings["idf"] * math.log(max(len(log) / events[item], 1))
                )
            scores[item] += score
    return dict(scores)


@pytest.mark.parametrize("name", ["STAN", "VSTAN"])
def test_stan_and_vstan_are_those_of_a_plain_loop(name: str) -> None:
    settings = {"neighbours": 12, "recent": 25, "position_decay": 2.0, "session_decay": 0.4, "item_decay": 1.5}
    settings |= {"shared_decay": 3.0, "idf": 0.7} if name == "VSTAN" else {}
    log = sessions()
    starts = np.cumsum(np.random.default_rng(2).integers(1, 1000, size=len(log)))
    scores = registry.BASELINES[name].build(*flat(log), ITEMS, starts, **settings)(pad_prefixes(PREFIXES, 8))
    for prefix, line in zip(PREFIXES, scores, strict=True):
        wanted = plain_stan(log, starts.tolist(), prefix, settings)
        greatest = max(wanted.values())
        for item in range(ITEMS):
            assert line[item] == pytest.approx(1 / (1 + math.log(greatest / wanted[item])) if item in wanted else 0.0, abs=1e-5)


def test_stan_s_decay_of_age_survives_logs_of_years() -> None:
    """Of two sessions, years old, the newer one counts more, though exp(-age) of both is no number of float64."""
    line = stan.stan(*flat([[0, 1], [0, 2], [8, 9]]), ITEMS, np.array([0, 10_000, 10**9]), session_decay=1e-6)(np.array([[0]]))[0]
    assert line[2] > line[1] > line[3:8].max()


def test_old_evidence_stays_above_popularity() -> None:
    log = [[0, 1]] + [[2, 3]] * 300
    line = stan.stan(*flat(log), ITEMS, np.arange(len(log)), session_decay=0.01, position_decay=0.5)(pad_prefixes([[0, 2]], 4))[0]
    assert np.argsort(-line)[:4].tolist() == [2, 3, 0, 1]


def test_ppmi_is_that_of_a_plain_loop() -> None:
    log, window, smoothing, damping, decay = sessions(), 2, 0.75, 3.0, 0.6
    pair: Counter = Counter()
    for session in log:
        for n, item in enumerate(session):
            for step in range(1, window + 1):
                if n + step < len(session):
                    pair[item, session[n + step]] += 1 / step
                    pair[session[n + step], item] += 1 / step
    count: Counter = Counter()
    for (item, _), times in pair.items():
        count[item] += times
    total = sum(times**smoothing for times in count.values())
    similarity = {
        (a, b): max(0.0, math.log(times * total / (count[a] * count[b] ** smoothing))) * times / (times + damping)
        for (a, b), times in pair.items()
        if a != b
    }
    scores = ppmi.ppmi_knn(*flat(log), ITEMS, None, window, smoothing, damping, decay)(pad_prefixes(PREFIXES, 8))
    for prefix, line in zip(PREFIXES, scores, strict=True):
        back = {item: len(prefix) - n for n, item in enumerate(prefix, 1)}
        wanted = [sum(decay**steps * similarity.get((item, other), 0.0) for item, steps in back.items()) for other in range(ITEMS)]
        for item in range(ITEMS):
            value = 1 / (1 + math.log(max(wanted) / wanted[item])) if wanted[item] > 0 else 0.0
            assert line[item] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("name", registry.BASELINES)
def test_long_prefixes_and_none_are_ranked(name: str) -> None:
    """Of more positions than float64 has powers of four, and an empty one."""
    prefix = np.random.default_rng(3).integers(0, ITEMS, size=700).tolist()
    scores = registry.BASELINES[name].build(*flat(sessions()), ITEMS)(pad_prefixes([prefix, []], 700))
    assert np.isfinite(scores).all() and scores[1].max() < 100


@pytest.mark.parametrize("name", registry.BASELINES)
def test_ranks_are_those_of_the_scores(name: str) -> None:
    scorer = registry.BASELINES[name].build(*flat(sessions()), ITEMS)
    rng = np.random.default_rng(1)
    prefixes = pad_prefixes([rng.integers(0, ITEMS, size=rng.integers(1, 9)).tolist() for _ in range(200)], 8)
    targets = rng.integers(0, ITEMS, size=200)
    scores = scorer(prefixes)
    wanted = target_ranks(torch.as_tensor(scores), torch.as_tensor(targets))
    assert scorer.ranks(prefixes, targets).tolist() == wanted.tolist()
    for k in (1, 20, ITEMS):
        assert scorer.top(prefixes, k).tolist() == np.argsort(-scores, axis=1, kind="stable")[:, :k].tolist()
