"""Chooses the candidates of a training step: all items of the training sessions, or a sample of them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recommender.session_model.windows import PAD

POWER = 0.75  # items are drawn by their counts to this power (Mikolov et al., NeurIPS 2013)


class Candidates(NamedTuple):
    """Holds the candidate items (C,), ascending, with their logQ correction, which is added to an item's logit so that the sum over the
    sampled items estimates the sum over all items."""

    items: Tensor  # (C,)
    correction: Tensor  # (C,)
    beta: float | None = None  # exponent of gBCE; None: the loss is a softmax
    begin: Tensor | None = None  # (C,) Unix seconds from which each item may be recommended; None: items are always available
    end: Tensor | None = None  # (C,) Unix seconds until which it may be recommended

    def within(self, limits: tuple[Tensor, Tensor] | None) -> "Candidates":
        """Adds times of availability: `limits` are begin (N,) and end (N,) of all items; None: no change."""
        return self if limits is None else self._replace(begin=limits[0][self.items], end=limits[1][self.items])

    def hidden(self, times: Tensor | None, targets: Tensor) -> Tensor | None:
        """Masks (E, C) bool the candidates that are not available at the times (E,) of the cases and so are no negatives. A target is
        never masked, nor is anything at a position without a target (PAD). None: no candidate is ever masked."""
        if self.begin is None or self.end is None or times is None:
            return None
        hidden = (self.begin > times[:, None]) | (self.end <= times[:, None])
        hidden &= (targets != PAD)[:, None] & (self.items != targets[:, None])
        return hidden

    def missed(self, times: Tensor | None, targets: Tensor) -> Tensor | None:
        """Tells (B, t, s) bool whether `hidden` masks the target of position t at position s: times and targets (B, L). None: never."""
        if self.begin is None or self.end is None or times is None:
            return None
        place = torch.searchsorted(self.items, targets.clamp(min=0)).clamp(max=len(self.items) - 1)
        begin, end = self.begin[place][..., None], self.end[place][..., None]
        missed = (begin > times[:, None, :]) | (end <= times[:, None, :])
        missed &= (targets != PAD)[:, None, :] & (targets[..., None] != targets[:, None, :])
        return missed


def everything(known: Tensor) -> Candidates:
    """Returns all items of the training sessions, `known` (N,) bool, without correction: the full softmax."""
    items = known.nonzero()[:, 0]
    return Candidates(items, torch.zeros(len(items), device=items.device))


def draw_probabilities(counts: np.ndarray) -> Tensor:
    """Computes the probability (N,) that a draw is of each item, from its training events `counts` (N,)."""
    share = torch.as_tensor(counts, dtype=torch.float64) ** POWER * torch.as_tensor(counts > 0)
    return share / share.sum()


def sampled(share: Tensor, items: Tensor, negatives: int, generator: torch.Generator) -> Candidates:
    """Returns the `items` of a batch (inputs and targets, any shape) and `negatives` items drawn with the probabilities `share` (N,);
    `share` and `generator` are on the CPU.

    Sampled softmax with logQ correction (Bengio and Senecal, 2008). The items of the batch have no correction, and draws of them are
    dropped, so that no item is both counted and corrected for (the flaw of the plain form: Khrylchenko et al., arXiv 2507.09331): the
    sum over the candidates is an unbiased estimate of the sum over all items.
    """
    draws = torch.multinomial(share, negatives, replacement=True, generator=generator)
    drawn, times = draws.unique(return_counts=True)  # type: ignore[no-untyped-call]
    batch_items = items[items != PAD].cpu().unique()  # type: ignore[no-untyped-call]
    rest = ~torch.isin(drawn, batch_items)
    correction = (times[rest] / (negatives * share[drawn[rest]])).log().float()
    candidates, order = torch.cat([batch_items, drawn[rest]]).sort()
    return Candidates(candidates.to(items.device), torch.cat([torch.zeros(len(batch_items)), correction])[order].to(items.device))


def drawn_evenly(known: Tensor, targets: Tensor, negatives: int, calibration: float, generator: torch.Generator) -> Candidates:
    """Returns the candidates of gBCE (gSASRec: Petrov and Macdonald, RecSys 2023): the targets of a batch (B, L) and `negatives` items
    drawn uniformly from those of the training sessions, `known` (N,) bool, by a generator on the CPU.

    With few negatives a binary cross-entropy overestimates all probabilities. So the target's probability is raised to the power
    beta = 1 - t (1 - a), where a is the sampled share of the items and t the `calibration`: 0 gives the plain loss, 1 gives the
    probabilities of a training without sampling. Departure from the paper: all cases of a step share their negatives. A target that was
    not drawn is no negative of the other cases: its correction is -inf.
    """
    warm = known.nonzero()[:, 0].cpu()
    drawn = warm[torch.randperm(len(warm), generator=generator)[:negatives]]
    items = torch.cat([drawn, targets[targets != PAD].cpu()]).unique()  # type: ignore[no-untyped-call]
    correction = torch.where(torch.isin(items, drawn), 0.0, -torch.inf)
    beta = 1 - calibration * (1 - len(drawn) / len(warm))
    return Candidates(items.to(targets.device), correction.to(targets.device), beta)
