"""Computes full-ranking metrics: the rank of each target among all items; HR, MRR, NDCG and Gini.

Ties get their average rank, so a model that scores all items equally is at chance and not at the top. A score that is NaN raises
an error.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

CUTOFFS = (5, 10, 20)
AT_ONCE = 250_000  # scores that are ranked at a time: they fit into the cache of a CPU


class NotANumber(ValueError):
    """Raised for scores that are NaN."""


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Returns the ranks (B,), from 1, of `targets` (B,) in `scores` (B, N). Raises `NotANumber`."""
    target_scores = scores.gather(1, targets[:, None])
    size = max(1, AT_ONCE // scores.shape[1])
    parts = (slice(start, start + size) for start in range(0, max(1, len(scores)), size))
    return torch.cat([_ranks(scores[part], target_scores[part]) for part in parts])


def _ranks(scores: Tensor, target_scores: Tensor) -> Tensor:
    if torch.isnan(scores.sum(1)).any() and torch.isnan(scores).any():  # the sum is faster, and NaN if a score is
        raise NotANumber("scores hold NaN: they cannot be ranked")
    above = torch.empty_like(scores)  # as floats, which are summed ten times as fast as booleans
    greater, equal = (compare(scores, target_scores, out=above).sum(1) for compare in (torch.gt, torch.eq))
    return 1 + greater + (equal - 1) / 2


def summarise(ranks: np.ndarray) -> dict[str, float]:
    """Returns HR@K, MRR@K and NDCG@K of the ranks (cases,) for each K of `CUTOFFS`, and the number of cases."""
    table: dict[str, float] = {"cases": len(ranks)}
    for cutoff in CUTOFFS if len(ranks) else ():
        for metric in ("HR", "MRR", "NDCG"):
            table[f"{metric}@{cutoff}"] = float(case_values(ranks, f"{metric}@{cutoff}").mean())
    return table


def case_values(ranks: np.ndarray, metric: str) -> np.ndarray:
    """Returns (cases,) the value of a metric ("HR@20") for each case; the metric is their mean."""
    name, _, cutoff = metric.partition("@")
    hit = ranks <= int(cutoff)
    return np.asarray(hit if name == "HR" else hit / ranks if name == "MRR" else hit / np.log2(1 + ranks))


def summarise_buckets(ranks: np.ndarray, buckets: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Returns bucket -> `summarise` of its cases, and of all of them ("all"). `buckets`: name -> (cases,) bool."""
    return {"all": summarise(ranks)} | {name: summarise(ranks[mask]) for name, mask in buckets.items()}


def gini(counts: np.ndarray) -> float:
    """Returns the Gini coefficient of `counts` (N,): 0 if all are equal, near 1 if one item has all."""
    total, items = counts.sum(), len(counts)
    places = 2 * np.arange(1, items + 1) - items - 1
    return float((places * np.sort(counts)).sum() / (items * total)) if total else 0.0
