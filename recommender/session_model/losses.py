"""Computes losses over the candidates of a training step."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recommender.session_model.negative_sampling import Candidates


def gbce(logits: Tensor, targets: Tensor, candidates: Candidates, hidden: Tensor | None = None) -> Tensor:
    """Computes the gBCE losses (E,) from the candidates' logits (E, C) and the targets (E,), which are among the candidates.

    Candidates that `hidden` (E, C) bool masks are no negatives. The losses of the negatives are summed, where the paper takes their
    mean: with thousands of negatives the gradients of a mean are too small for Adam.
    """
    items, correction, beta = candidates.items, candidates.correction, candidates.beta
    assert beta is not None
    place, logits = torch.searchsorted(items, targets)[:, None], logits.float()
    negatives = (logits + correction).scatter(1, place, -torch.inf)
    if hidden is not None:
        negatives = negatives.masked_fill(hidden, -torch.inf)
    return beta * F.softplus(-logits.gather(1, place)[:, 0]) + F.softplus(negatives).sum(1)


def log_partition(queries: Tensor, vectors: Tensor, bias: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Computes log sum_c exp(queries_e . vectors_c + bias_c): queries (E, D), vectors (C, D), bias (C,) -> (E,) float32. The terms that
    `hidden` (E, C) bool masks are left out of the sum."""
    sums: Tensor = _LogPartition.apply(queries, vectors, bias, hidden)  # type: ignore[no-untyped-call]
    return sums


class _LogPartition(torch.autograd.Function):
    """Computes `log_partition` with one pass over the matrix (E, C).

    It takes most of a training step: autograd would pass about twelve times over that matrix, which exceeds every cache. Here it is
    computed once, and the gradients are products of it with small matrices. There is no second derivative.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, vectors: Tensor, bias: Tensor, hidden: Tensor | None) -> Tensor:
        logits = queries @ vectors.T  # under autocast in bf16, and so are the products of the gradients
        exponentials = logits.float().add_(bias)
        if hidden is not None:
            exponentials.masked_fill_(hidden, -torch.inf)
        greatest = exponentials.amax(1, keepdim=True)
        total = exponentials.sub_(greatest).exp_().sum(1, keepdim=True)  # at least 1
        ctx.save_for_backward(queries, vectors, exponentials.to(logits.dtype), total)
        return (total.log() + greatest)[:, 0]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, vectors, exponentials, total = ctx.saved_tensors
        weight = grad[:, None] / total
        grad_queries = (exponentials @ vectors.to(exponentials.dtype)) * weight
        grad_vectors = exponentials.T @ (queries * weight).to(exponentials.dtype)
        grad_bias = weight.to(exponentials.dtype).T @ exponentials
        return grad_queries.to(queries.dtype), grad_vectors.to(vectors.dtype), grad_bias[0].float(), None
