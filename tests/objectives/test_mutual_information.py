"""The bounds against cases whose mutual information is known in closed form."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.mutual_information import (
    BATCH,
    ESTIMATORS,
    MINE,
    NATS,
    D,
    L1Out,
    closed_form,
    gaussians,
    learn,
    measured,
    squared_correlation,
)
from pipeline.core.distill_config import CriticConfig
from pipeline.distill.critic import Critic
from pipeline.objectives.contrastive import info_nce
from pipeline.objectives.mutual_information import CLUB, SMILE, Bound, CLUBSample, Gaussian, InfoNCE, Separable

MEASURED = dict.fromkeys(ESTIMATORS, (0.0, 2.0, 6.0)) | {"SMILE": NATS, "NWJ": (0.0, 2.0), "MINE": (0.0, 2.0)}
UPPER = {"CLUB": CLUB, "CLUBSample": CLUBSample, "L1Out": L1Out}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- the table of benchmarks/mutual_information.py


@cache  # each is a training
def estimated(name: str, nats: float) -> float:
    """An estimator's figure for pairs of that much information, of one seed."""
    return measured(name, nats, seed=0)


OURS = [name if name in ("InfoNCE", "SMILE", "CLUB", "CLUBSample") else pytest.param(name, marks=pytest.mark.slow) for name in ESTIMATORS]


def test_the_lower_bounds_that_are_trained_find_the_information() -> None:
    assert estimated("InfoNCE", 2.0) == pytest.approx(2.0, abs=0.4)
    for nats in NATS[1:]:
        assert estimated("SMILE", nats) == pytest.approx(nats, rel=0.15)


@pytest.mark.slow
def test_the_estimators_of_the_benchmark_find_the_information() -> None:
    for name in ("NWJ", "MINE"):
        assert estimated(name, 2.0) == pytest.approx(2.0, abs=0.5)
    assert estimated("L1Out", 2.0) == pytest.approx(2.0, rel=0.15)
    assert 6.0 < estimated("L1Out", 6.0) < estimated("CLUB", 6.0)  # past log N it leaves, upwards


def test_info_nce_stays_below_log_n_where_the_information_does_not() -> None:
    assert max(NATS) > math.log(BATCH)
    assert max(estimated("InfoNCE", nats) for nats in MEASURED["InfoNCE"]) <= math.log(BATCH)
    assert estimated("SMILE", 6.0) > estimated("InfoNCE", 6.0)


def test_club_is_its_closed_form_and_not_the_information() -> None:
    for name in ("CLUB", "CLUBSample"):
        for nats in MEASURED[name][1:]:
            assert closed_form(nats) > 2 * nats
            assert estimated(name, nats) == pytest.approx(closed_form(nats), rel=0.1)


@pytest.mark.parametrize("name", OURS)
def test_unrelated_pairs_share_nothing_and_estimates_rise_with_the_information(name: str) -> None:
    found = [estimated(name, nats) for nats in MEASURED[name]]
    assert abs(found[0]) < 0.1
    assert sorted(found) == found


# --- without any learning


def exact(nats: float) -> Gaussian:
    """q(y | x) = p(y | x) for the Gaussians."""
    square, q = squared_correlation(nats), Gaussian(D, D, 1)
    mean, log_variance = nn.Linear(D, D), nn.Linear(D, D)
    with torch.no_grad():
        mean.weight.copy_(math.sqrt(square) * torch.eye(D))
        mean.bias.zero_()
        log_variance.weight.zero_()
        log_variance.bias.fill_(math.log(1 - square))
    q.mean, q.log_variance = mean, log_variance  # type: ignore[assignment]
    return q


def averaged(bound: Bound, count: int, nats: float, batches: int) -> float:
    with torch.no_grad():
        return float(np.mean([float(bound.estimate(*gaussians(count, nats))) for _ in range(batches)]))


@pytest.mark.parametrize("name", ["CLUB", "CLUBSample"])
@pytest.mark.parametrize("count", [4, 64])
def test_club_has_the_same_mean_in_batches_of_any_size(name: str, count: int) -> None:
    """The negative is never the row itself, which would pull small batches down."""
    assert averaged(UPPER[name](exact(2.0)), count, 2.0, 40_000 // count) == pytest.approx(closed_form(2.0), rel=0.05)


def test_club_is_the_mean_of_club_sample_over_all_negatives() -> None:
    (x, y), q = gaussians(7, 2.0), Gaussian(D, D, 8)
    each = [float(CLUBSample(q).estimate(x, y, shift).detach()) for shift in range(1, 7)]
    assert float(CLUB(q).estimate(x, y).detach()) == pytest.approx(np.mean(each), abs=1e-4)


def test_l1out_falls_towards_the_information_from_above() -> None:
    found = [averaged(L1Out(exact(4.0)), count, 4.0, 10_000 // count) for count in (8, 64, 512)]
    assert found[0] > found[1] > found[2] > 4.0
    assert found[2] < 4.3


def test_a_certain_network_is_held_at_the_least_variance() -> None:
    """For y = x the bound has no end; the floor on the log-variance gives it one: E|y_i - y_k|^2 / (2 exp(floor))."""
    x = torch.randn(4096, D)
    q = Gaussian(D, D, 8, least_log_variance=-2.0)
    with torch.no_grad():
        q.log_variance[2].bias.fill_(-50.0)
        q.log_variance[2].weight.zero_()
    q.mean = nn.Identity()  # type: ignore[assignment]
    for bound in (CLUB(q), CLUBSample(q)):
        assert float(bound.estimate(x, x).detach()) == pytest.approx(D * math.exp(2.0), rel=0.05)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_networks_learn_without_moving_the_features_and_the_bound_moves_them(name: str) -> None:
    x, y = (z.requires_grad_() for z in gaussians(64, 2.0))
    bound = ESTIMATORS[name]()
    bound.learning_loss(x, y).backward()
    assert x.grad is None
    assert y.grad is None
    assert all(parameter.grad is not None for _, parameter in bound.named_parameters())
    bound.estimate(x, y).backward()
    assert x.grad is not None
    assert y.grad is not None


@pytest.mark.parametrize("name", ESTIMATORS)
def test_half_precision_features_are_measured_in_full(name: str) -> None:
    x, y = (z.bfloat16() for z in gaussians(64, 2.0))
    bound = ESTIMATORS[name]()
    for found in (bound.estimate(x, y), bound.learning_loss(x, y), info_nce(x, y, 0.1)):
        assert found.dtype == torch.float32
        assert found.shape == ()


def test_mine_divides_its_gradient_by_the_running_mean() -> None:
    bound = MINE(Separable(D, D, 8))

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, bound.critic.h[2].bias)[0]

    (x, y), other = gaussians(64, 2.0), gaussians(64, 2.0)
    own = gradient(-bound.estimate(x, y))
    torch.testing.assert_close(gradient(bound.learning_loss(x, y)), own)  # of the first batch, the mean is its own
    bound.learning_loss(*(3 * z for z in other))
    assert not torch.allclose(gradient(bound.learning_loss(x, y)), own)
    assert torch.isfinite(bound.state_dict()["log_mean"])  # kept with the weights


def test_smile_reads_no_unrelated_pair_beyond_the_clip() -> None:
    (x, y), critic = gaussians(64, 2.0), Separable(D, D, 8)
    critic.g = critic.h = nn.Identity()  # type: ignore[assignment]
    scores = x @ y.T
    unrelated = scores[~torch.eye(64, dtype=torch.bool)]
    assert unrelated.max() > 5
    for clip in (1.0, 5.0, math.inf):
        expected = scores.diagonal().mean() - unrelated.clamp(-clip, clip).exp().mean().log()
        assert float(SMILE(critic, clip).estimate(x, y)) == pytest.approx(float(expected), abs=1e-4)


# --- as objectives


def test_minimising_club_sample_takes_away_what_a_probe_can_find() -> None:
    """y is made of a part that x knows and a private one; it may keep any four directions of the two."""
    dim = 4
    made = nn.Sequential(nn.Linear(2 * dim, dim), nn.BatchNorm1d(dim, affine=False))  # of unit variance: no way out by shrinking

    def draw() -> tuple[Tensor, Tensor]:
        shared = torch.randn(BATCH, dim)
        return shared + 0.3 * torch.randn(BATCH, dim), made(torch.cat([shared, torch.randn(BATCH, dim)], 1))

    def probe() -> float:
        fresh = InfoNCE(Separable(dim, dim, 64))
        learn(fresh, draw)
        with torch.no_grad():
            return float(np.mean([float(fresh.estimate(*draw())) for _ in range(32)]))

    before = probe()
    club = CLUBSample(Gaussian(dim, dim, 64))
    own, features = torch.optim.AdamW(club.parameters(), 3e-3), torch.optim.AdamW(made.parameters(), 1e-2)
    for step in range(250):
        x, y = draw()
        for _ in range(2):
            own.zero_grad()
            club.learning_loss(x, y).backward()
            own.step()
        if step >= 50:
            features.zero_grad()
            club.estimate(x, y).backward()
            features.step()
    assert before > 1.0
    assert probe() < before / 2


@pytest.mark.parametrize("net", [lambda: CLUBSample(Gaussian(D, D, 8)), lambda: SMILE(Separable(D, D, 8))])
def test_a_critic_moves_features_only_after_its_warm_up(net: Callable[[], Bound]) -> None:
    x, y = (nn.functional.normalize(z, dim=-1).requires_grad_() for z in gaussians(64, 2.0))
    critic = Critic(net(), CriticConfig(warmup=2), torch.device("cpu"))
    before = critic.measure(x, y)
    for _ in range(2):
        assert float((bound := critic.bound(x, y)).detach()) == 0
        assert not bound.requires_grad
    assert critic.measure(x, y) != before  # it has learned all the same
    critic.bound(x, y).backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    assert float(critic.bound(x[:1], y[:1]).detach()) == 0  # one row has no other to be told from


# --- InfoNCE as the training objective, whose features are their own critic


def optimal_bound(count: int, nats: float) -> float:
    """log N - loss at the best critic there is, log p(y | x) / p(y), written as an inner product."""
    square = squared_correlation(nats)
    x, y = gaussians(count, nats)
    x = torch.cat([x * math.sqrt(square) / (1 - square), torch.ones(count, 1)], 1)
    y = torch.cat([y, -square * (y**2).sum(1, keepdim=True) / (2 * (1 - square))], 1)
    return math.log(count) - float(info_nce(x, y, 1.0))


def test_info_nce_finds_two_nats() -> None:
    bound = np.mean([optimal_bound(512, nats=2.0) for _ in range(20)])
    assert 1.6 < bound < 2.05
    assert 3.7 < np.mean([optimal_bound(64, nats=12.0) for _ in range(20)]) <= math.log(64)  # what the batch allows


def test_info_nce_of_unrelated_pairs_is_nothing() -> None:
    x, y = gaussians(4096, nats=0.0)
    x, y = (torch.nn.functional.normalize(z, dim=-1) for z in (x, y))
    assert abs(math.log(4096) - float(info_nce(x, y, 1.0))) < 0.1
