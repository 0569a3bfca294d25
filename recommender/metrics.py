"""Full-ranking metrics: the rank of each target among all items, and what follows from ranks.

Ties count as their average rank, so a model that scores everything equally is at chance and not at the top; a score
that is not a number is an error, never a rank.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CUTOFFS = (5, 10, 20)
DRAWS = 10_000  # of the bootstrap
DRAWS_AT_ONCE = 500  # bounds its memory


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Ranks (B,) from 1 of `targets` (B,) in `scores` (B, N); ties get their average rank."""
    if torch.isnan(scores).any():
        raise ValueError("scores hold NaN: no rank follows from them")
    own = scores.gather(1, targets[:, None])
    greater = (scores > own).sum(1)
    equal = (scores == own).sum(1)
    return 1 + greater + (equal - 1) / 2


def summarise(ranks: np.ndarray) -> dict[str, float]:
    """HR@K, MRR@K and NDCG@K of the ranks, and their number."""
    table: dict[str, float] = {"cases": len(ranks)}
    for cutoff in CUTOFFS if len(ranks) else ():
        for metric in ("HR", "MRR", "NDCG"):
            table[f"{metric}@{cutoff}"] = float(case_values(ranks, f"{metric}@{cutoff}").mean())
    return table


def case_values(ranks: np.ndarray, metric: str) -> np.ndarray:
    """What each rank adds to a metric, whose mean over the cases it is."""
    name, _, cutoff = metric.partition("@")
    hit = ranks <= int(cutoff)
    return np.asarray(hit if name == "HR" else hit / ranks if name == "MRR" else hit / np.log2(1 + ranks))


def summarise_buckets(ranks: np.ndarray, buckets: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """`summarise` over all cases and over each bucket, a (cases,) bool mask."""
    return {"all": summarise(ranks)} | {name: summarise(ranks[mask]) for name, mask in buckets.items()}


class Difference(NamedTuple):
    mean: float
    low: float  # ends of the 95 % interval
    high: float
    p: float  # two-sided


def paired_bootstrap(ours: np.ndarray, theirs: np.ndarray, session: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Difference:
    """How far the mean of `ours` (cases,) is above that of `theirs` on the same cases, whose test sessions are numbered in
    `session` (cases,). Whole sessions are drawn, with replacement: the cases of one are not independent.

    Percentile interval; p is twice the share of draws on the far side of zero (Efron and Tibshirani, 1993).
    """
    _, place = np.unique(session, return_inverse=True)
    total, cases = np.bincount(place, ours.astype(float) - theirs), np.bincount(place)
    rng, found = np.random.default_rng(seed), []
    for first in range(0, draws, DRAWS_AT_ONCE):
        drawn = rng.integers(len(cases), size=(min(DRAWS_AT_ONCE, draws - first), len(cases)))
        found.append(total[drawn].sum(1) / cases[drawn].sum(1))
    means = np.concatenate(found)
    low, high = np.quantile(means, (0.025, 0.975))
    beyond = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Difference(float(total.sum() / cases.sum()), float(low), float(high), min(1.0, 2 * (1 + beyond) / (1 + draws)))
