"""Bounds on the mutual information I(x; y) of paired rows, in nats, from one batch.

Lower bounds (maximise one: the pairs come to share information) score pairs with a critic: `InfoNCE`, `NWJ`, `MINE`,
`SMILE`. Upper bounds (minimise one: they come to share none) model y given x by a Gaussian: `CLUB`, `CLUBSample`,
`L1Out`. `info_nce` is the training objective on features that are their own critic. A bound is not the quantity, and each
fails in its own way, said in its docstring; any lower bound that holds with confidence is at most about the logarithm of
the sample (McAllester and Stratos, arXiv 1811.04251). So logs say "InfoNCE" and "CLUB bound", never "MI".
`benchmarks/mutual_information.py` puts all of them beside the truth.

Everything is computed in fp32. The rows of a batch are taken as independent draws: row i of x with any other row of y
stands for a pair of strangers.
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
    """What every estimator below is: a module with two functions of N > 1 paired rows, x (N, Dx) and y (N, Dy)."""

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        """The bound, a scalar to move x and y by."""

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """A scalar to train the bound's own networks by; x and y are detached here."""

    def to(self, device: torch.device) -> Any: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


# --- lower bounds: a critic f(x, y) scores pairs


class Separable(nn.Module):
    """The critic f(x, y) = g(x) . h(y), g and h MLPs of one hidden layer.

    Separable, because all N^2 pairs of a batch then cost 2 N passes through an MLP and one matrix product, where an MLP of
    the concatenated pair costs N^2 passes. Given features enough, such products reach any smooth f.
    """

    def __init__(self, x_dim: int, y_dim: int, hidden: int) -> None:
        super().__init__()
        self.g, self.h = _mlp(x_dim, hidden, hidden), _mlp(y_dim, hidden, hidden)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """g(x) and h(y), both (N, hidden)."""
        return self.g(x.float()), self.h(y.float())

    def scores(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """f of the N pairs, (N,), and of the strangers, (N * (N - 1),)."""
        g, h = self(x, y)
        scores = g @ h.T
        return scores.diagonal(), scores[~torch.eye(len(x), dtype=torch.bool, device=x.device)]


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _log_mean_exp(x: Tensor) -> Tensor:
    return x.logsumexp(0) - math.log(len(x))


class InfoNCE(nn.Module):
    """E[f(x_i, y_i) - log 1/N sum_j exp f(x_i, y_j)] (van den Oord et al., arXiv 1807.03748).

    Of all the bounds here the one of least variance. Its bias is its ceiling: never above log N, so it says little about
    an I near or beyond that.
    """

    def __init__(self, critic: Separable) -> None:
        super().__init__()
        self.critic = critic

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        g, h = self.critic(x, y)
        return math.log(len(x)) - info_nce(g, h, temperature=1.0)

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.estimate(x.detach(), y.detach())


class NWJ(nn.Module):
    """E_p[f] - 1/e E_q[exp f], p the pairs and q the strangers (Nguyen, Wainwright and Jordan, arXiv 0809.0853).

    Unbiased for a given critic, so no ceiling. But the second term lives on the few strangers that look like pairs: its
    variance grows exponentially with I (Song and Ermon, arXiv 1910.06222), and one of them can throw a training step far
    off (clip the gradient). In practice it falls short from a few nats on.
    """

    def __init__(self, critic: Separable) -> None:
        super().__init__()
        self.critic = critic

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, strangers = self.critic.scores(x, y)
        return pairs.mean() - (_log_mean_exp(strangers) - 1).exp()

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.estimate(x.detach(), y.detach())


class MINE(nn.Module):
    """E_p[f] - log E_q[exp f], the Donsker-Varadhan bound (Belghazi et al., arXiv 1801.04062).

    The gradient of a logarithm of a batch's mean is biased, so it is divided by a running mean of the batches' in place of
    its own. The estimate itself stays biased upwards, the more the smaller the batch, and has the variance of `NWJ`. A mean
    that forgets fast lets the critic run away after one freak batch, the more likely the larger I.
    """

    log_mean: Tensor

    def __init__(self, critic: Separable, decay: float = 0.99) -> None:
        super().__init__()
        self.critic, self.decay = critic, decay
        self.register_buffer("log_mean", torch.tensor(math.nan))  # of the running mean; nan before the first batch

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, strangers = self.critic.scores(x, y)
        return pairs.mean() - _log_mean_exp(strangers)

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, strangers = self.critic.scores(x.detach(), y.detach())
        now = _log_mean_exp(strangers)
        running = torch.logaddexp(self.log_mean + math.log(self.decay), now.detach() + math.log(1 - self.decay))
        self.log_mean = torch.where(self.log_mean.isnan(), now.detach(), running)
        return (now - self.log_mean).exp() - pairs.mean()


class SMILE(nn.Module):
    """E_p[f] - log E_q[exp clip(f, -clip, clip)] (Song and Ermon, arXiv 1910.06222).

    The critic is trained as a classifier of pairs against strangers, by the Jensen-Shannon bound, which is tame at any I;
    the clip bounds the variance of the estimate. The price: it is no bound any more. Where true log-ratios exceed the clip
    it reads too high, without one it has the faults of `MINE`.
    """

    def __init__(self, critic: Separable, clip: float = 5.0) -> None:
        super().__init__()
        self.critic, self.clip = critic, clip

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, strangers = self.critic.scores(x, y)
        return pairs.mean() - _log_mean_exp(strangers.clamp(-self.clip, self.clip))

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        pairs, strangers = self.critic.scores(x.detach(), y.detach())
        return F.softplus(-pairs).mean() + F.softplus(strangers).mean()


# --- upper bounds: a variational network q(y | x)


class Gaussian(nn.Module):
    """q(y | x), a diagonal Gaussian whose mean and log-variance are MLPs of x."""

    def __init__(self, x_dim: int, y_dim: int, hidden: int, least_log_variance: float = -LOG_VARIANCE) -> None:
        super().__init__()
        self.least_log_variance = least_log_variance  # clamped, not squashed: a tanh caps the bound
        self.mean, self.log_variance = _mlp(x_dim, hidden, y_dim), _mlp(x_dim, hidden, y_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, both (N, Dy)."""
        return self.mean(x), self.log_variance(x).clamp(self.least_log_variance, LOG_VARIANCE)

    def log_density(self, x: Tensor, y: Tensor) -> Tensor:
        """log q(y | x) without the constant, (N,) of x (N, Dx) and y (N, Dy); (N, N) of y (N, 1, Dy), row i of y_i."""
        mean, log_variance = self(x.float())
        log_q: Tensor = -0.5 * ((y.float() - mean) ** 2 / log_variance.exp() + log_variance).sum(-1)
        return log_q

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log-likelihood."""
        return -self.log_density(x.detach(), y.detach()).mean()


class CLUB(nn.Module):
    """E[log q(y_i | x_i) - log q(y_j | x_i)], j any other row (Cheng et al., arXiv 2006.12013).

    Above I if q is p(y | x), and far above it: for Gaussians of correlation rho a dimension it is D rho^2 / (1 - rho^2). With
    a learned q it bounds I only while q is close: train q before and between uses; a negative value says that q lags
    behind. Where y is nearly a function of x it has no end but the floor of the log-variance. The mean over j needs
    no more than mean and variance of y, as q is Gaussian: O(N).
    """

    def __init__(self, q: Gaussian) -> None:
        super().__init__()
        self.q = q

    def estimate(self, x: Tensor, y: Tensor) -> Tensor:
        y = y.float()
        mean, log_variance = self.q(x.float())
        own, any_row = (y - mean) ** 2, (y.mean(0) - mean) ** 2 + y.var(0, correction=0)
        unpaired = len(x) / (len(x) - 1)  # any row may be the own one, at which the difference is zero
        bound: Tensor = unpaired * 0.5 * ((any_row - own) / log_variance.exp()).sum(-1).mean()
        return bound

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.q.learning_loss(x, y)


class CLUBSample(nn.Module):
    """vCLUB-S: `CLUB` from one negative a row (Cheng et al., arXiv 2006.12013, section 3.3), of the same mean, more noise.

    Row i's negative is row i + `shift`: a rotation leaves no row at its place, as a random order does with one on average.
    Where neighbours in the batch are alike, change the shift from step to step.
    """

    def __init__(self, q: Gaussian) -> None:
        super().__init__()
        self.q = q

    def estimate(self, x: Tensor, y: Tensor, shift: int = 1) -> Tensor:
        return (self.q.log_density(x, y) - self.q.log_density(x, y.roll(-shift, 0))).mean()

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.q.learning_loss(x, y)


class L1Out(nn.Module):
    """E[log q(y_i | x_i) - log 1/(N - 1) sum_(j != i) q(y_i | x_j)] (Poole et al., arXiv 1905.06922).

    If q is p(y | x) it is above I, and falls towards it as N grows: close, where `CLUB` is not, while I is well below
    log N. A q of too little variance makes it far too high, as no other row then explains y_i. O(N^2 Dy).
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
