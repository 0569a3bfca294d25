"""Contrastive losses on features: InfoNCE, the relation loss, and KL from a teacher's distribution."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(x: Tensor, y: Tensor, temperature: float, log_q: Tensor | None = None, target: Tensor | None = None) -> Tensor:
    """The InfoNCE loss, log N minus the lower bound of I(x; y) (van den Oord et al., arXiv 1807.03748).

    x (N, D) and y (M, D), L2-normalised; row i of x belongs to row `target[i]` of y (None: to row i). `log_q` (M,)
    is the log probability with which each row of y came to be a candidate; subtracting it from the logits corrects
    in-batch negatives for popularity (Yi et al., RecSys 2019). Rows of y must differ as items, else a negative is false.
    """
    logits = x.float() @ y.float().T / temperature
    if log_q is not None:
        logits = logits - log_q
    if target is None:
        target = torch.arange(len(x), device=x.device)
    return F.cross_entropy(logits, target)


def soft_loss(scores: Tensor, teacher: Tensor) -> Tensor:
    """KL from a teacher's next-item distribution, given by log-scores (n, C), to that of `scores` (n, C) (P2Rec, arXiv 2406.00333).

    Both are the distributions over all items, restricted to the same candidates, so how these came to be candidates
    cancels out: no logQ correction, which is for negatives that stand for all other items.
    """
    return F.kl_div(scores.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def relation_loss(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """KL between the batch's similarity structures: how y (N, D) sees each item's neighbours, reproduced under x (N, D).

    The item-item form of relational distillation (RDist of LLaVA-KD, arXiv 2410.16236, is its token-level kin).
    """
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    ours, theirs = ((z @ z.T / temperature).masked_fill(itself, -1e4).log_softmax(-1) for z in (x, y))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
