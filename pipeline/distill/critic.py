"""Trains the networks of a bound on mutual information beside the features it measures.

A critic learns on detached features, with its own optimiser, a few inner steps before every use, and enters a loss only after a warm-up.
All processes take the same steps on the same gathered features, so their critics stay equal without communication.
"""

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.core.checkpoint import pack_optimizer, unpack_optimizer
from pipeline.core.distill_config import CriticConfig, DistillConfig
from pipeline.objectives.mutual_information import SMILE, Bound, CLUBSample, Gaussian, InfoNCE, Separable

# Lower limit of q's log-variance, for features of unit variance. Where one feature nearly determines the other, an unlimited q gives the
# bound a gradient that collapses the features before anything else is learned.
LEAST_LOG_VARIANCE = -2.0


class Critic:
    """Trains and evaluates the bound `net` for pairs of unit vectors, scaled to unit variance. The bound is in units of `unit` nats.

    `probe` is another bound with the same networks, for held-out pairs; None: `net` itself.
    """

    def __init__(self, net: Bound, config: CriticConfig, device: torch.device, unit: float = 1.0, probe: Bound | None = None) -> None:
        self.net, self.probe, self.config, self.unit, self.step = net, probe or net, config, unit, 0
        self.net.to(device)
        self.names = [name for name, _ in net.named_parameters()]
        self.optimizer = torch.optim.AdamW([parameter for _, parameter in net.named_parameters()], config.lr)
        self.value = 0.0  # the newest bound

    def bound(self, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        """Trains the networks on the detached (N, D) features, then returns the bound with a gradient for these; 0 during the warm-up."""
        if len(x) < 2:  # no negatives
            return x.sum() * 0
        x, y = _unit_variance(x), _unit_variance(y)
        for _ in range(self.config.inner_steps):
            self.optimizer.zero_grad()
            self.net.learning_loss(x, y).backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.step += 1
        bound = self.net.estimate(x, y, **options) / self.unit
        self.value = float(bound.detach())
        return bound if self.step > self.config.warmup else bound.detach() * 0

    def measure(self, x: Tensor, y: Tensor) -> float:
        """Evaluates the bound on (N, D) features, without training."""
        with torch.no_grad():
            return float(self.probe.estimate(_unit_variance(x), _unit_variance(y)) / self.unit)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the state as flat named tensors and JSON."""
        moments, optimizer = pack_optimizer(self.optimizer, self.names)
        return self.net.state_dict() | moments, {"optimizer": optimizer, "step": self.step}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.net.load_state_dict({name: tensors[name] for name in self.net.state_dict()})
        unpack_optimizer(self.optimizer, self.names, tensors, state["optimizer"])
        self.step = state["step"]


def _unit_variance(x: Tensor) -> Tensor:
    return x * math.sqrt(x.shape[1])


def club(config: DistillConfig, device: torch.device) -> Critic:
    """Makes the critic of the vCLUB-S bound, in nats per dimension."""
    q = Gaussian(config.dim, config.dim, config.critic.hidden, LEAST_LOG_VARIANCE)
    return Critic(CLUBSample(q), config.critic, device, unit=config.dim)


def club_bound(critic: Critic, x: Tensor, y: Tensor) -> Tensor:
    """Computes the CLUB bound as a loss. Rows may be in catalogue order, so the offset of the negatives changes with each step."""
    # a negative bound means that q lags behind, and is no reason to move the features
    return critic.bound(x, y, shift=1 + critic.step % max(1, len(x) - 1)).clamp(min=0)


def smile(config: DistillConfig, device: torch.device) -> Critic:
    """Makes the critic of SMILE, probed by InfoNCE: on a few held-out rows SMILE, which has no ceiling, is far too high."""
    scores = Separable(config.dim, config.dim, config.critic.hidden)
    return Critic(SMILE(scores), config.critic, device, probe=InfoNCE(scores))
