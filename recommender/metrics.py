"""Full-ranking metrics: the rank of each target among all items, and what follows from ranks.

Ties count as their average rank, so a model that scores everything equally is at chance and not at the top; a score
that is not a number is an error, never a rank.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

CUTOFFS = (5, 10, 20)


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
        hit = ranks <= cutoff
        table[f"HR@{cutoff}"] = float(hit.mean())
        table[f"MRR@{cutoff}"] = float((hit / ranks).mean())
        table[f"NDCG@{cutoff}"] = float((hit / np.log2(1 + ranks)).mean())
    return table


def summarise_buckets(ranks: np.ndarray, buckets: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """`summarise` over all cases and over each bucket, a (cases,) bool mask."""
    return {"all": summarise(ranks)} | {name: summarise(ranks[mask]) for name, mask in buckets.items()}
