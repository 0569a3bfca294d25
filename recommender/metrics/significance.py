"""Tests the difference of two models on the same cases by a paired bootstrap over sessions."""

from typing import NamedTuple

import numpy as np

DRAWS = 10_000  # bootstrap samples
DRAWS_AT_ONCE = 500
DRAWN_AT_ONCE = 10_000_000  # sessions: bounds its memory


class Difference(NamedTuple):
    """A mean difference, with its interval and p-value."""

    mean: float
    low: float  # ends of the 95 % interval
    high: float
    p: float  # two-sided


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray, session: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Tests mean(ours) - mean(theirs), (cases,) both. `session` (cases,): number of the session of each case. See `paired_bootstraps`."""
    return paired_bootstraps((ours.astype(float) - theirs)[None], session, draws, seed)[0]


def paired_bootstraps(differences: np.ndarray, session: np.ndarray, draws: int = DRAWS, seed: int = 0) -> list[Difference]:
    """Tests whether the mean of each of `differences` (K, cases) differs from zero.

    Complete sessions, numbered by `session` (cases,), are drawn with replacement, as the cases of a session are not independent. All
    comparisons use the same draws. The interval is the percentile interval; p is twice the share of draws beyond zero (Efron and
    Tibshirani, 1993)."""
    _, place = np.unique(session, return_inverse=True)
    sums = np.stack([*(np.bincount(place, difference) for difference in differences), np.bincount(place)], axis=1)  # (sessions, K + 1)
    rng, count, drawn = np.random.default_rng(seed), len(sums), []
    at_once = max(1, min(DRAWS_AT_ONCE, DRAWN_AT_ONCE // count))
    for first in range(0, draws, at_once):
        picks = rng.integers(count, size=(min(at_once, draws - first), count))
        drawn.append(np.stack([np.bincount(pick, minlength=count) for pick in picks]) @ sums)
    totals = np.concatenate(drawn)
    results = []
    for means, mean in zip((totals[:, :-1] / totals[:, -1:]).T, sums[:, :-1].sum(0) / sums[:, -1].sum(), strict=True):
        low, high = np.quantile(means, (0.025, 0.975))
        beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
        results.append(Difference(float(mean), float(low), float(high), min(1.0, 2 * (1 + beyond) / (1 + draws))))
    return results
