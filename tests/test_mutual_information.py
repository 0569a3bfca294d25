"""The bounds against cases whose mutual information is known in closed form."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.mutual_information import ClubSample, info_nce

D = 10  # dimensions


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def squared_correlation(information: float) -> float:
    """rho^2 a dimension at which D-dimensional Gaussians share so many nats: I = -(D / 2) ln(1 - rho^2)."""
    return 1 - math.exp(-2 * information / D)


def gaussians(count: int, information: float) -> tuple[Tensor, Tensor]:
    """(N, D) twice."""
    square = squared_correlation(information)
    x = torch.randn(count, D)
    return x, math.sqrt(square) * x + math.sqrt(1 - square) * torch.randn(count, D)


def optimal_bound(count: int, information: float) -> float:
    """log N - loss at the best critic there is, log p(y | x) / p(y), written as an inner product."""
    square = squared_correlation(information)
    x, y = gaussians(count, information)
    x = torch.cat([x * math.sqrt(square) / (1 - square), torch.ones(count, 1)], 1)
    y = torch.cat([y, -square * (y**2).sum(1, keepdim=True) / (2 * (1 - square))], 1)
    return math.log(count) - float(info_nce(x, y, 1.0))


@pytest.mark.parametrize("count", [2, 16, 64])
@pytest.mark.parametrize("temperature", [0.001, 0.1, 1.0])
def test_info_nce_never_promises_more_than_log_n(count: int, temperature: float) -> None:
    assert optimal_bound(count, information=20.0) <= math.log(count) + 1e-6
    x = torch.nn.functional.normalize(torch.randn(count, D), dim=-1)
    for y in (x, -x, x.roll(1, 0)):
        assert math.log(count) - float(info_nce(x, y, temperature)) <= math.log(count) + 1e-6


def test_info_nce_finds_two_nats() -> None:
    bound = np.mean([optimal_bound(512, information=2.0) for _ in range(20)])
    assert 1.6 < bound < 2.05
    assert 3.7 < np.mean([optimal_bound(64, information=12.0) for _ in range(20)]) <= math.log(64)  # what the batch allows


def test_info_nce_of_strangers_is_nothing() -> None:
    x, y = gaussians(4096, information=0.0)
    x, y = (torch.nn.functional.normalize(z, dim=-1) for z in (x, y))
    assert abs(math.log(4096) - float(info_nce(x, y, 1.0))) < 0.1


def test_target_names_the_partner() -> None:
    x, y = gaussians(32, information=2.0)
    order = torch.randperm(32)
    assert float(info_nce(x, y, 0.5)) == pytest.approx(float(info_nce(x, y[order], 0.5, target=order.argsort())), abs=1e-5)


def learned_club(information: float) -> float:
    club = ClubSample(D, D, hidden=64)
    optimizer = torch.optim.AdamW(club.parameters(), 3e-3)
    steps = 300
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        club.learning_loss(*gaussians(256, information)).backward()
        optimizer.step()
    x, y = gaussians(40_000, information)
    with torch.no_grad():
        return float(club.estimate(x, y, shift=1))


def test_club_is_the_closed_form_and_not_the_information() -> None:
    square = squared_correlation(2.0)
    closed = D * square / (1 - square)
    assert closed > 2 * 2.0  # an upper bound, and far from tight
    assert learned_club(2.0) == pytest.approx(closed, rel=0.1)


def test_club_of_strangers_is_nothing() -> None:
    assert abs(learned_club(0.0)) < 0.1


def test_a_certain_network_is_held_at_the_least_variance() -> None:
    """For y = x the bound has no end; the floor on the log-variance gives it one: E|y_i - y_k|^2 / (2 exp(floor))."""
    x = torch.randn(4096, D)
    club = ClubSample(D, D, 8, least_log_variance=-2.0)
    with torch.no_grad():
        club.log_variance[2].bias.fill_(-50.0)
        club.log_variance[2].weight.zero_()
    club.mean = torch.nn.Identity()  # type: ignore[assignment]
    assert float(club.estimate(x, x, shift=1).detach()) == pytest.approx(D * math.exp(2.0), rel=0.05)


def test_the_network_learns_without_moving_the_features_and_the_bound_moves_them() -> None:
    x, y = (z.requires_grad_() for z in gaussians(64, 2.0))
    club = ClubSample(D, D, hidden=16)
    club.learning_loss(x, y).backward()
    assert x.grad is None
    assert y.grad is None
    club.estimate(x, y, shift=3).backward()
    assert x.grad is not None
    assert y.grad is not None


def test_half_precision_features_are_measured_in_full() -> None:
    x, y = gaussians(64, 2.0)
    club = ClubSample(D, D, hidden=16)
    for measure in (lambda a, b: info_nce(a, b, 0.1), lambda a, b: club.estimate(a, b, 1)):
        assert measure(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def learned_similarity(law: np.ndarray, corrected: bool) -> np.ndarray:
    """(S, V) free similarities trained by retrieval of v ~ law[s], with the batch's distinct targets as candidates."""
    rng = np.random.default_rng(0)
    contexts, items = law.shape
    share = law.mean(0)
    similarity = torch.zeros(contexts, items, requires_grad=True)
    optimizer = torch.optim.Adam([similarity], 0.05)
    batch, steps = 24, 1500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        asked = rng.integers(contexts, size=batch)
        followed = (law[asked].cumsum(1) < rng.random((batch, 1))).sum(1).clip(max=items - 1)
        candidates, target = np.unique(followed, return_inverse=True)
        came = torch.from_numpy(np.log(1 - (1 - share[candidates]) ** batch)).float()
        rows = torch.eye(items)[candidates]
        loss = info_nce(similarity[asked], rows, 1.0, came if corrected else None, torch.from_numpy(target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return similarity.detach().softmax(-1).numpy()


def test_with_the_correction_the_bare_similarity_ranks_by_how_likely_an_item_is() -> None:
    """Popular items are the others' targets, so negatives, more often: uncorrected, the similarity learns to push them down."""
    rng = np.random.default_rng(1)
    contexts, items = 3, 30
    law = (1 + np.arange(items)) ** -1.2 * np.exp(rng.normal(size=(contexts, items)))  # popular items first
    law /= law.sum(1, keepdims=True)
    divergence = {}
    for corrected in (True, False):
        found = learned_similarity(law, corrected)
        divergence[corrected] = float((law * np.log(law / found)).sum(1).mean())
    assert divergence[True] < 0.1
    assert divergence[False] > 4 * divergence[True]
