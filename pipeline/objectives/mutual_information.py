"""Estimates bounds on the mutual information I(x; y) of paired rows, in nats, from one batch.

Lower bounds, to be maximised, score pairs with a critic: `InfoNCE` and `SMILE`. Upper bounds, to be minimised, model y given x by a
Gaussian: `CLUB` and `CLUBSample`. `info_nce` is the training objective on features that are their own critic. A bound is not the quantity;
its docstring says where it fails; any lower bound that holds with confidence is at most about the logarithm of the sample size
(McAllester and Stratos, arXiv 1811.04251). So logs say "InfoNCE" and "CLUB bound", never "MI". `benchmarks/mutual_information.py`
compares these and other estimators with the true value.

Everything is computed in fp32. The rows of a batch are independent draws: row i of x with any other row of y is an unpaired sample.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.objectives.contrastive import info_nce

LOG_VARIANCE = 10.0  # largest log-variance of q, and, unless a caller says otherwise, minus the smallest


class Bound(Protocol):
    """The interface of an estimator: a module with two functions of N > 1 paired rows, x (N, Dx) and y (N, Dy)."""

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the bound, a scalar with a gradient for x and y."""

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the loss of the bound's networks; x and y are detached."""

    def to(self, device: torch.device) -> Any: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


# --- lower bounds: a critic f(x, y) scores pairs


class Separable(nn.Module):
    """Scores pairs by f(x, y) = g(x) . h(y), g and h MLPs with one hidden layer.

    For all N^2 pairs of a batch a separable critic costs 2 N passes through an MLP and one matrix product; an MLP of the concatenated pair
    would cost N^2 passes. With enough features, such products approximate any smooth f.
    """

    def __init__(self, x_dim: int, y_dim: int, hidden: int) -> None:
        super().__init__()
        self.g, self.h = _mlp(x_dim, hidden, hidden), _mlp(y_dim, hidden, hidden)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Computes g(x) and h(y), both (N, hidden)."""
        return self.g(x.float()), self.h(y.float())

    def scores(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Computes f for the N pairs, (N,), and for all unpaired rows, (N * (N - 1),)."""
        g, h = self(x, y)
        scores = g @ h.T
        return scores.diagonal(), scores[~torch.eye(len(x), dtype=torch.bool, device=x.device)]


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def log_mean_exp(x: Tensor) -> Tensor:
    return x.logsumexp(0) - math.log(len(x))


class InfoNCE(nn.Module):
    """E[f(x_i, y_i) - log 1/N sum_j exp f(x_i, y_j)] (van den Oord et al., arXiv 1807.03748).

    The bound of least variance. It is never above log N, so it says little about an I near or beyond log N.
    """

    def __init__(self, critic: Separable) -> None:
        super().__init__()
        self.critic = critic

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        g, h = self.critic(x, y)
        return math.log(len(x)) - info_nce(g, h, temperature=1.0)

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.estimate(x.detach(), y.detach())


class SMILE(nn.Module):
    """E_p[f] - log E_q[exp clip(f, -clip, clip)] (Song and Ermon, arXiv 1910.06222).

    p is the distribution of the pairs, q that of unpaired rows. The critic is trained as a classifier of pairs against unpaired rows, by
    the Jensen-Shannon bound, which is stable at any I; the clip bounds the variance of the estimate. The result is no longer a bound: it is
    too high where true log-ratios exceed the clip. Without a clip it has the bias and variance of MINE.
    """

    def __init__(self, critic: Separable, clip: float = 5.0) -> None:
        super().__init__()
        self.critic, self.clip = critic, clip

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, unpaired = self.critic.scores(x, y)
        return pairs.mean() - log_mean_exp(unpaired.clamp(-self.clip, self.clip))

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, unpaired = self.critic.scores(x.detach(), y.detach())
        return F.softplus(-pairs).mean() + F.softplus(unpaired).mean()


# --- upper bounds: a variational network q(y | x)


class Gaussian(nn.Module):
    """Models q(y | x) as a diagonal Gaussian whose mean and log-variance are MLPs of x."""

    def __init__(self, x_dim: int, y_dim: int, hidden: int, least_log_variance: float = -LOG_VARIANCE) -> None:
        super().__init__()
        self.least_log_variance = least_log_variance  # clamped: a tanh would limit the bound
        self.mean, self.log_variance = _mlp(x_dim, hidden, y_dim), _mlp(x_dim, hidden, y_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Computes mean and log-variance, both (N, Dy)."""
        return self.mean(x), self.log_variance(x).clamp(self.least_log_variance, LOG_VARIANCE)

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes log q(y | x) without the constant: (N,) for x (N, Dx) and y (N, Dy); (N, N) for y (N, 1, Dy), row i of y_i."""
        mean, log_variance = self(x.float())
        log_q: Tensor = -0.5 * ((y.float() - mean) ** 2 / log_variance.exp() + log_variance).sum(-1)
        return log_q

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Computes the negative log-likelihood."""
        return -self.log_density(x.detach(), y.detach()).mean()


class CLUB(nn.Module):
    """E[log q(y_i | x_i) - log q(y_j | x_i)], j any other row (Cheng et al., arXiv 2006.12013).

    Far above I if q is p(y | x): for Gaussians with correlation rho per dimension it is D rho^2 / (1 - rho^2). With a learned q it bounds I
    only while q is close: train q before and between uses; a negative value means that q lags behind. Where y is nearly a function of x,
    only the floor of the log-variance limits it. Since q is Gaussian, the mean over j needs only the mean and variance of y: O(N).
    """

    def __init__(self, q: Gaussian) -> None:
        super().__init__()
        self.q = q

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        y = y.float()
        mean, log_variance = self.q(x.float())
        paired, any_row = (y - mean) ** 2, (y.mean(0) - mean) ** 2 + y.var(0, correction=0)
        correction = len(x) / (len(x) - 1)  # any row includes the paired one, where the difference is zero
        bound: Tensor = correction * 0.5 * ((any_row - paired) / log_variance.exp()).sum(-1).mean()
        return bound

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.q.learning_loss(x, y)


class CLUBSample(nn.Module):
    """vCLUB-S: `CLUB` from one negative per row (Cheng et al., arXiv 2006.12013, section 3.3), with the same mean and more noise.

    The negative of row i is row i + `shift`: a rotation leaves no row in its place, where a random order leaves one on average. If
    neighbours in the batch are alike, change the shift from step to step.
    """

    def __init__(self, q: Gaussian) -> None:
        super().__init__()
        self.q = q

    def estimate(self, x: Tensor, y: Tensor, shift: int = 1) -> Tensor:
        return (self.q.log_density(x, y) - self.q.log_density(x, y.roll(-shift, 0))).mean()

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.q.learning_loss(x, y)
