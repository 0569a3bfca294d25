"""Full-ranking metrics: the rank of each target among all items, and what follows from ranks.

Ties count as their average rank, so a model that scores everything equally is at chance and not at the top; a score
that is not a number is an error, never a rank.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

CUTOFFS = (5, 10, 20)
AT_ONCE = 250_000  # scores: few enough for a processor's own cache


class NotANumber(ValueError):
    """Scores that nothing can be ranked by."""


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Ranks (B,) from 1 of `targets` (B,) in `scores` (B, N); ties get their average rank."""
    own = scores.gather(1, targets[:, None])
    size = max(1, AT_ONCE // scores.shape[1])
    parts = (slice(start, start + size) for start in range(0, max(1, len(scores)), size))
    return torch.cat([_ranks(scores[part], own[part]) for part in parts])


def _ranks(scores: Tensor, own: Tensor) -> Tensor:
    if torch.isnan(scores.sum(1)).any() and torch.isnan(scores).any():  # the sum first: it is quicker, and NaN if a score is
        raise NotANumber("scores hold NaN: no rank follows from them")
    above = torch.empty_like(scores)  # as numbers, which are summed ten times as fast as truth values
    greater, equal = (compare(scores, own, out=above).sum(1) for compare in (torch.gt, torch.eq))
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


def gini(counts: np.ndarray) -> float:
    """How unevenly `counts` (N,) are spread: 0 where all are equal, near 1 where one has everything."""
    total, items = counts.sum(), len(counts)
    places = 2 * np.arange(1, items + 1) - items - 1
    return float((places * np.sort(counts)).sum() / (items * total)) if total else 0.0
