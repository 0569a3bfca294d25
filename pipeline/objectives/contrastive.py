"""Contrastive losses on features: InfoNCE, the relation loss, and KL from a teacher's distribution."""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Computes the InfoNCE loss: log N minus the lower bound of I(x; y) (van den Oord et al., arXiv 1807.03748).

    x (N, D) and y (N, D), L2-normalised; row i of x is paired with row i of y. The rows of y must be distinct items, else there are
    false negatives.
    """
    return F.cross_entropy(x.float() @ y.float().T / temperature, torch.arange(len(x), device=x.device))


def soft_loss(scores: Tensor, teacher: Tensor) -> Tensor:
    """Computes the KL divergence from a teacher's next-item distribution, log-scores (n, C), to `scores` (n, C) (P2Rec, arXiv 2406.00333).

    Both distributions are restricted to the same candidates, so the sampling of the candidates cancels out. There is no logQ correction,
    which is for negatives that represent all other items.
    """
    return F.kl_div(scores.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def relation_loss(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Computes the KL divergence between similarity structures: of y (N, D), to be reproduced by x (N, D), over a batch.

    The item-item form of relational distillation; RDist of LLaVA-KD (arXiv 2410.16236) is the token-level form.
    """
    itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
    ours, theirs = ((z @ z.T / temperature).masked_fill(itself, -1e4).log_softmax(-1) for z in (x, y))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
