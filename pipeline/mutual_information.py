"""Bounds on the mutual information I(x; y) of paired rows, as training objectives.

`info_nce` is a lower bound (maximise it: the pairs come to share information), `ClubSample` an upper one (minimise
it: they come to share none). Everything is computed in fp32, in nats. A bound is not the quantity: InfoNCE cannot
exceed log N, and CLUB lies far above I for dependent Gaussians, so logs say "InfoNCE" and "CLUB bound", never "MI".
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_VARIANCE = 10.0  # largest log-variance of q, and, unless a caller says otherwise, minus the smallest


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


class ClubSample(nn.Module):
    """vCLUB-S, an upper bound of I(x; y) from one negative a row (Cheng et al., arXiv 2006.12013, section 3.3).

    E[log q(y_i | x_i) - log q(y_k | x_i)] with k != i and q a diagonal Gaussian whose mean and log-variance are MLPs
    of x. It bounds I only while q is close to p(y | x): train q by `learning_loss` on detached features, with an
    optimiser of its own, before and between uses. For Gaussians of correlation rho a dimension the bound is
    D * rho^2 / (1 - rho^2), well above I. Negative values say that q lags behind.
    """

    def __init__(self, x_dim: int, y_dim: int, hidden: int, least_log_variance: float = -LOG_VARIANCE) -> None:
        super().__init__()
        self.least_log_variance = least_log_variance  # clamped, not squashed: a tanh caps the bound
        self.mean = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, y_dim))
        self.log_variance = nn.Sequential(nn.Linear(x_dim, hidden), nn.ReLU(), nn.Linear(hidden, y_dim))

    def _log_q(self, x: Tensor, y: Tensor) -> Tensor:
        """(N,) log q(y_i | x_i), without the constant."""
        mean, log_variance = self.mean(x), self.log_variance(x).clamp(self.least_log_variance, LOG_VARIANCE)
        log_q: Tensor = -0.5 * ((y - mean) ** 2 / log_variance.exp() + log_variance).sum(-1)
        return log_q

    def learning_loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log-likelihood of q on x (N, Dx), y (N, Dy)."""
        return -self._log_q(x.detach().float(), y.detach().float()).mean()

    def estimate(self, x: Tensor, y: Tensor, shift: int) -> Tensor:
        """The bound on x (N, Dx), y (N, Dy); row i's negative is row i + shift, so `shift` must not be a multiple of N."""
        x, y = x.float(), y.float()
        return (self._log_q(x, y) - self._log_q(x, y.roll(-shift, 0))).mean()
