"""Paired bootstrap over sessions: whether one model is better than another on the same cases."""

from typing import NamedTuple

import numpy as np

DRAWS = 10_000  # of the bootstrap
DRAWS_AT_ONCE = 500
DRAWN_AT_ONCE = 10_000_000  # sessions: bounds its memory


class Difference(NamedTuple):
    mean: float
    low: float  # ends of the 95 % interval
    high: float
    p: float  # two-sided


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray, session: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Difference:
    """How far the mean of `ours` (cases,) is above that of `theirs` on the same cases, whose test sessions are numbered in
    `session` (cases,): `paired_bootstraps` of one comparison."""
    return paired_bootstraps((ours.astype(float) - theirs)[None], session, draws, seed)[0]


def paired_bootstraps(differences: np.ndarray, session: np.ndarray, draws: int = DRAWS, seed: int = 0) -> list[Difference]:
    """How far the mean of each of `differences` (K, cases) is above zero. Whole sessions, which `session` (cases,) numbers, are
    drawn, with replacement: the cases of one are not independent. All comparisons see the same draws.

    Percentile interval; p is twice the share of draws on the far side of zero (Efron and Tibshirani, 1993).
    """
    _, place = np.unique(session, return_inverse=True)
    sums = np.stack([*(np.bincount(place, of) for of in differences), np.bincount(place)], axis=1)  # (sessions, K + 1)
    rng, count, drawn = np.random.default_rng(seed), len(sums), []
    at_once = max(1, min(DRAWS_AT_ONCE, DRAWN_AT_ONCE // count))
    for first in range(0, draws, at_once):
        picks = rng.integers(count, size=(min(at_once, draws - first), count))
        drawn.append(np.stack([np.bincount(pick, minlength=count) for pick in picks]) @ sums)
    totals = np.concatenate(drawn)
    found = []
    for means, mean in zip((totals[:, :-1] / totals[:, -1:]).T, sums[:, :-1].sum(0) / sums[:, -1].sum(), strict=True):
        low, high = np.quantile(means, (0.025, 0.975))
        beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
        found.append(Difference(float(mean), float(low), float(high), min(1.0, 2 * (1 + beyond) / (1 + draws))))
    return found
