"""Tests ranks against brute force, ties, NaN, windows and the bootstrap."""

import numpy as np
import pytest
import torch

from recommender.metrics.ranks import CUTOFFS, summarise, target_ranks
from recommender.metrics.significance import paired_bootstrap
from recommender.session_model.windows import PAD, batches, pack, pad_prefixes, prefixes_of


def test_ranks_are_those_of_sorting() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 12, size=(40, 30)).astype(np.float32)  # many ties
    targets = rng.integers(0, 30, size=40)
    for rank, line, target in zip(target_ranks(torch.tensor(scores), torch.tensor(targets)), scores, targets, strict=True):
        places = [1 + n for n, value in enumerate(sorted(line, reverse=True)) if value == line[target]]
        assert float(rank) == pytest.approx(np.mean(places))


def test_metrics_are_those_of_the_definitions() -> None:
    ranks = np.array([1.0, 2.5, 7.0, 40.0, 20.0])
    table = summarise(ranks)
    for cutoff in CUTOFFS:
        hits = [r for r in ranks if r <= cutoff]
        assert table[f"HR@{cutoff}"] == pytest.approx(len(hits) / 5)
        assert table[f"MRR@{cutoff}"] == pytest.approx(sum(1 / r for r in hits) / 5)
        assert table[f"NDCG@{cutoff}"] == pytest.approx(sum(1 / np.log2(1 + r) for r in hits) / 5)


def test_a_model_that_scores_all_items_equally_is_at_chance() -> None:
    ranks = target_ranks(torch.zeros(50, 200), torch.arange(50)).numpy()
    assert np.all(ranks == 100.5)
    assert summarise(ranks)["MRR@20"] == 0


def test_nan_scores_are_an_error() -> None:
    scores = torch.zeros(2, 5)
    scores[1, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        target_ranks(scores, torch.tensor([0, 0]))


@pytest.mark.parametrize("stride", [1, 3])
def test_windows_hold_every_case_once_with_its_prefix(stride: int) -> None:
    rng = np.random.default_rng(1)
    lengths = [2, 3, 7, 8, 20, 31]
    sessions = [rng.integers(0, 1000, size=n) for n in lengths]
    windows = pack(np.concatenate(sessions), np.cumsum([0, *lengths]), max_prefix=6, stride=stride)
    prefixes, targets = prefixes_of(windows)
    cases = sorted((tuple(p[p != PAD]), t) for p, t in zip(prefixes.tolist(), targets.tolist(), strict=False) for p in [np.array(p)])
    assert len(cases) == sum(lengths) - len(lengths) == windows.cases
    if stride == 1:  # whole prefixes
        wanted = sorted((tuple(s[max(0, n - 6) : n]), s[n]) for s in sessions for n in range(1, len(s)))
        assert cases == wanted
    else:  # suffixes of them, of half the length at least
        assert sorted(t for _, t in cases) == sorted(x for s in sessions for x in s[1:])
        complete = {tuple(s[:n]) for s in sessions for n in range(1, len(s))}
        assert all(any(w[-len(p) :] == p for w in complete) for p, _ in cases)


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    once, again, other = (np.concatenate(list(batches(100, 7, 3, e))) for e in (4, 4, 5))
    assert np.array_equal(once, again)
    assert not np.array_equal(once, other)
    assert sorted(once) == list(range(100))


def test_a_prefix_is_cut_to_its_last_events() -> None:
    assert pad_prefixes([[1, 2, 3, 4], [5], []], 3).tolist() == [[2, 3, 4], [5, PAD, PAD], [PAD, PAD, PAD]]


def test_the_bootstrap_draws_complete_sessions() -> None:
    """Compared with the same draws in plain Python, one by one."""
    rng = np.random.default_rng(3)
    session = np.repeat(np.arange(7), rng.integers(1, 5, 7))
    ours, theirs = rng.random(len(session)), rng.random(len(session))
    difference = paired_bootstrap(ours, theirs, session + 100, draws=700, seed=5)
    draws, means = np.random.default_rng(5), []
    for picked in [line for size in (500, 200) for line in draws.integers(7, size=(size, 7))]:
        values = [ours[case] - theirs[case] for number in picked for case in np.flatnonzero(session == number)]
        means.append(np.mean(values))
    assert difference.mean == pytest.approx(np.mean(ours - theirs))
    assert (difference.low, difference.high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))))
    assert difference.p == pytest.approx(2 * (1 + min(np.sum(np.array(means) <= 0), np.sum(np.array(means) >= 0))) / 701)


def test_the_bootstrap_distinguishes_a_difference_from_none() -> None:
    rng = np.random.default_rng(0)
    session, base = np.repeat(np.arange(300), 3), rng.random(900)
    better = paired_bootstrap(base + 0.1 + 0.1 * rng.normal(size=900), base, session)
    assert better.low < 0.1 < better.high and better.low > 0.08 and better.p < 0.001
    assert paired_bootstrap(base, base, session).p == 1
    per_session = np.repeat(rng.normal(size=300), 3)  # what a session shares is one observation, not three
    together, apart = (paired_bootstrap(per_session, np.zeros(900), number) for number in (session, np.arange(900)))
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
