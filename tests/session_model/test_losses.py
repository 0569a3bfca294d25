"""Losses over candidates: gBCE, the sampled softmax, and the gradients of the log-partition."""

import numpy as np
import pytest
import torch

from helpers.session_models import COLD, ITEMS, random_model, training_sessions
from recommender.session_model.losses import gbce, log_partition
from recommender.session_model.negative_sampling import draw_probabilities, drawn_evenly, everything, sampled
from recommender.session_model.windows import PAD


def test_gbce_is_the_loss_of_the_paper_over_the_drawn_negatives() -> None:
    model, targets = random_model(content=False), torch.tensor([[7, 3, PAD]])
    candidates = drawn_evenly(model.known, targets, 11, 0.5, torch.Generator().manual_seed(0))
    drawn = set(candidates.items[candidates.correction == 0].tolist())
    assert len(drawn) == 11 and set(candidates.items.tolist()) == drawn | {3, 7}
    assert candidates.beta == pytest.approx(1 - 0.5 * (1 - 11 / (ITEMS - COLD)))
    logits = torch.randn(2, len(candidates.items))
    chance = dict(zip(candidates.items.tolist(), logits.sigmoid().T.tolist(), strict=True))
    for case, target in enumerate((7, 3)):
        wanted = -np.log(chance[target][case] ** candidates.beta) - sum(np.log(1 - chance[item][case]) for item in drawn - {target})
        assert float(gbce(logits, torch.tensor([7, 3]), candidates)[case]) == pytest.approx(wanted, rel=1e-4)


def test_a_sampled_softmax_estimates_the_full_one() -> None:
    """The mean over many samples of the sum over the candidates is the sum over all items, and targets are always in it."""
    model = random_model(content=False)
    counts = np.bincount(training_sessions()[0], minlength=ITEMS)
    targets, generator, logits = torch.tensor([[7, 3, PAD]]), torch.Generator().manual_seed(0), torch.randn(ITEMS)
    full = everything(model.known)
    wanted, estimates = logits[full.items].exp().sum(), []
    for _ in range(400):
        items, correction, *_ = sampled(draw_probabilities(counts), targets, 16, generator)
        assert {3, 7} <= set(items.tolist()) <= set(full.items.tolist()) and torch.equal(items, items.unique())
        estimates.append((logits[items] + correction).exp().sum())
    assert abs(torch.stack(estimates).mean() / wanted - 1) < 0.05


@pytest.mark.parametrize("bf16", [False, True])
def test_log_partition_has_the_gradient_of_autograd(bf16: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 16), (50, 16), (50,)]
    ours, autograd = (
        [torch.randn(shape, generator=generator.manual_seed(n)).requires_grad_() for n, shape in enumerate(shapes)] for _ in "ab"
    )
    weight, tolerance = torch.rand(7, generator=generator), 0.03 if bf16 else 1e-5
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        sums = log_partition(*ours)
        wanted = (autograd[0] @ autograd[1].T + autograd[2]).float().logsumexp(-1)
        assert torch.allclose(sums, wanted, rtol=tolerance)
        for result in (sums, wanted):
            (result * weight).sum().backward()  # type: ignore[no-untyped-call]
    for tensor, reference in zip(ours, autograd, strict=True):
        assert tensor.grad is not None and reference.grad is not None and tensor.grad.dtype == reference.grad.dtype
        assert (tensor.grad - reference.grad).norm() < tolerance * reference.grad.norm()
