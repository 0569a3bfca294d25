"""Compares estimators of mutual information on Gaussians with a known value: a table of docs/experiments.md.

    python benchmarks/mutual_information.py --seeds 10

x ~ N(0, 1) in each of 10 dimensions, y = rho x + sqrt(1 - rho^2) e, so I = -5 ln(1 - rho^2). Networks learn on fresh batches,
and the estimate is the mean over fresh batches of the same size. Compare CLUB and CLUBSample with CLUB's closed form,
D rho^2 / (1 - rho^2), the others with I. NWJ, MINE and L1Out are defined here: the method does not use them.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.objectives.mutual_information import CLUB, SMILE, Bound, CLUBSample, Gaussian, InfoNCE, Separable, log_mean_exp

D, HIDDEN = 10, 64
NATS = (0.0, 1.0, 2.0, 4.0, 6.0)
BATCH, STEPS, LEARNING_RATE = 256, 300, 3e-3
FRESH_BATCHES = 64


class NWJ(nn.Module):
    """E_p[f] - 1/e E_q[exp f], p the pairs and q unpaired rows (Nguyen, Wainwright and Jordan, arXiv 0809.0853).

    Unbiased for a given critic, so it has no ceiling. But the second term depends on the few unpaired rows that look like pairs: its
    variance grows exponentially with I (Song and Ermon, arXiv 1910.06222), and one such row can spoil a training step (clip the
    gradient). In practice it is too low from a few nats on.
    """

    def __init__(self, critic: Separable) -> None:
        super().__init__()
        self.critic = critic

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, unpaired = self.critic.scores(x, y)
        return pairs.mean() - (log_mean_exp(unpaired) - 1).exp()

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.estimate(x.detach(), y.detach())


class MINE(nn.Module):
    """E_p[f] - log E_q[exp f], the Donsker-Varadhan bound (Belghazi et al., arXiv 1801.04062).

    The gradient of the logarithm of a batch mean is biased, so the gradient is divided by a running mean over batches instead. The estimate
    itself is biased upwards, more so for smaller batches, and has the variance of `NWJ`. With a fast decay one unusual batch can make the
    critic diverge, more likely for larger I.
    """

    log_mean: Tensor

    def __init__(self, critic: Separable, decay: float = 0.99) -> None:
        super().__init__()
        self.critic, self.decay = critic, decay
        self.register_buffer("log_mean", torch.tensor(math.nan))  # of the running mean; nan before the first batch

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, unpaired = self.critic.scores(x, y)
        return pairs.mean() - log_mean_exp(unpaired)

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, unpaired = self.critic.scores(x.detach(), y.detach())
        current = log_mean_exp(unpaired)
        running = torch.logaddexp(self.log_mean + math.log(self.decay), current.detach() + math.log(1 - self.decay))
        self.log_mean = torch.where(self.log_mean.isnan(), current.detach(), running)
        return (current - self.log_mean).exp() - pairs.mean()


class L1Out(nn.Module):
    """E[log q(y_i | x_i) - log 1/(N - 1) sum_(j != i) q(y_i | x_j)] (Poole et al., arXiv 1905.06922).

    If q is p(y | x) it is above I and falls towards it as N grows: close, unlike `CLUB`, while I is well below log N. A q with too little
    variance makes it far too high, because no other row then explains y_i. O(N^2 Dy).
    """

    def __init__(self, q: Gaussian) -> None:
        super().__init__()
        self.q = q

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        log_q = self.q.log_density(x, y[:, None])
        itself = torch.eye(len(x), dtype=torch.bool, device=x.device)
        others = log_q.masked_fill(itself, -math.inf).logsumexp(1) - math.log(len(x) - 1)
        return (log_q.diagonal() - others).mean()

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.q.learning_loss(x, y)


ESTIMATORS: dict[str, Callable[[], Bound]] = {
    "InfoNCE": lambda: InfoNCE(Separable(D, D, HIDDEN)),
    "NWJ": lambda: NWJ(Separable(D, D, HIDDEN)),
    "MINE": lambda: MINE(Separable(D, D, HIDDEN)),
    "SMILE": lambda: SMILE(Separable(D, D, HIDDEN)),
    "L1Out": lambda: L1Out(Gaussian(D, D, HIDDEN)),
    "CLUB": lambda: CLUB(Gaussian(D, D, HIDDEN)),
    "CLUBSample": lambda: CLUBSample(Gaussian(D, D, HIDDEN)),
}


def squared_correlation(nats: float) -> float:
    """Returns the rho^2 per dimension at which I is `nats`."""
    return 1 - math.exp(-2 * nats / D)


def closed_form(nats: float) -> float:
    """Returns the value of CLUB for these Gaussians."""
    square = squared_correlation(nats)
    return D * square / (1 - square)


def gaussians(count: int, nats: float) -> tuple[Tensor, Tensor]:
    """Draws x and y, both (N, D)."""
    square = squared_correlation(nats)
    x = torch.randn(count, D)
    return x, math.sqrt(square) * x + math.sqrt(1 - square) * torch.randn(count, D)


def learn(bound: Bound, draw: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Trains the networks of `bound` on fresh pairs. Gradients are clipped for the sake of NWJ."""
    parameters = [parameter for _, parameter in bound.named_parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        bound.learning_loss(*draw()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def measured(name: str, nats: float, seed: int) -> float:
    torch.manual_seed(seed)
    bound = ESTIMATORS[name]()
    learn(bound, lambda: gaussians(BATCH, nats))
    with torch.no_grad():
        return float(np.mean([float(bound.estimate(*gaussians(BATCH, nats))) for _ in range(FRESH_BATCHES)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    print(f"Mean ± standard deviation over {len(seeds)} seeds; N = {BATCH}, log N = {math.log(BATCH):.2f}.\n")
    print(f"| I | {' | '.join(ESTIMATORS)} | CLUB's closed form |\n|{' --- |' * (len(ESTIMATORS) + 2)}")
    for nats in NATS:
        found = [np.array([measured(name, nats, seed) for seed in seeds]) for name in ESTIMATORS]
        cells = [f"{of.mean():.2f} ± {of.std(ddof=1) if len(of) > 1 else 0:.2f}" for of in found]
        print(f"| {nats:g} | {' | '.join(cells)} | {closed_form(nats):.2f} |", flush=True)


if __name__ == "__main__":
    main()
