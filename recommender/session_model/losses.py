"""Losses over the candidates of a training step."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recommender.session_model.negative_sampling import Candidates


def gbce(logits: Tensor, targets: Tensor, candidates: Candidates, hidden: Tensor | None = None) -> Tensor:
    """Logits of the candidates, (E, C), and each case's target, (E,), one of them -> losses (E,). A sum over the candidates, where
    the paper has a mean: of thousands of them the gradients of a mean are too small for Adam to tell from nothing."""
    items, correction, beta = candidates.items, candidates.correction, candidates.beta
    assert beta is not None
    place, logits = torch.searchsorted(items, targets)[:, None], logits.float()
    others = (logits + correction).scatter(1, place, -torch.inf)
    if hidden is not None:
        others = others.masked_fill(hidden, -torch.inf)
    return beta * F.softplus(-logits.gather(1, place)[:, 0]) + F.softplus(others).sum(1)


def log_partition(queries: Tensor, vectors: Tensor, bias: Tensor, hidden: Tensor | None = None) -> Tensor:
    """log sum_c exp(queries_e . vectors_c + bias_c): queries (E, D), vectors (C, D), bias (C,) -> (E,) float32. The `hidden` (E, C) count
    for nothing."""
    found: Tensor = _LogPartition.apply(queries, vectors, bias, hidden)  # type: ignore[no-untyped-call]
    return found


class _LogPartition(torch.autograd.Function):
    """Most of a training step. What autograd makes of the formula goes a dozen times through a matrix (E, C) that no cache holds;
    here it is made once, and gradients are products of it with what is small. A second derivative has none."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, vectors: Tensor, bias: Tensor, hidden: Tensor | None) -> Tensor:
        logits = queries @ vectors.T  # under autocast in bf16, as are the products below then
        share = logits.float().add_(bias)
        if hidden is not None:
            share.masked_fill_(hidden, -torch.inf)
        greatest = share.amax(1, keepdim=True)
        total = share.sub_(greatest).exp_().sum(1, keepdim=True)  # 1 at least
        ctx.save_for_backward(queries, vectors, share.to(logits.dtype), total)
        return (total.log() + greatest)[:, 0]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, vectors, share, total = ctx.saved_tensors
        weight = grad[:, None] / total
        of_queries = (share @ vectors.to(share.dtype)) * weight
        of_vectors = share.T @ (queries * weight).to(share.dtype)
        of_bias = weight.to(share.dtype).T @ share
        return of_queries.to(queries.dtype), of_vectors.to(vectors.dtype), of_bias[0].float(), None
