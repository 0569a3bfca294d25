"""The items a training step compares with: all of the training sessions, or a sample of them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recommender.session_model.windows import PAD

POWER = 0.75  # items are drawn by their counts to this power (Mikolov et al., NeurIPS 2013)


class Candidates(NamedTuple):
    """Of the items (C,), ascending, one that was drawn speaks for those that were not: its logit is raised by its `correction`."""

    items: Tensor  # (C,)
    correction: Tensor  # (C,)
    beta: float | None = None  # of gBCE; None: of a softmax
    begin: Tensor | None = None  # (C,) Unix seconds from which each may be recommended; None: all always
    end: Tensor | None = None  # (C,) and until which

    def within(self, limits: tuple[Tensor, Tensor] | None) -> "Candidates":
        """The same, each only from the first to the second of the `limits`, (N,) both, of all items."""
        return self if limits is None else self._replace(begin=limits[0][self.items], end=limits[1][self.items])

    def hidden(self, times: Tensor | None, targets: Tensor) -> Tensor | None:
        """(E, C) bool: which candidates are no negatives of the cases (E,), for they cannot be recommended at their times (E,). A target
        always counts, and where there is none (PAD), nothing is hidden. None: nothing is hidden at all."""
        if self.begin is None or self.end is None or times is None:
            return None
        hidden = (self.begin > times[:, None]) | (self.end <= times[:, None])
        hidden &= (targets != PAD)[:, None] & (self.items != targets[:, None])
        return hidden

    def missed(self, times: Tensor | None, targets: Tensor) -> Tensor | None:
        """(B, t, s) bool: whether the target of position t is among what `hidden` hides at position s; of `times` and `targets` (B, L)."""
        if self.begin is None or self.end is None or times is None:
            return None
        place = torch.searchsorted(self.items, targets.clamp(min=0)).clamp(max=len(self.items) - 1)
        begin, end = self.begin[place][..., None], self.end[place][..., None]
        missed = (begin > times[:, None, :]) | (end <= times[:, None, :])
        missed &= (targets != PAD)[:, None, :] & (targets[..., None] != targets[:, None, :])
        return missed


def everything(known: Tensor) -> Candidates:
    """The full softmax, over the items of the training sessions, `known` (N,) bool."""
    items = known.nonzero()[:, 0]
    return Candidates(items, torch.zeros(len(items), device=items.device))


def share_drawn(counts: np.ndarray) -> Tensor:
    """(N,) how likely each item is to be drawn, by its training events `counts` (N,)."""
    share = torch.as_tensor(counts, dtype=torch.float64) ** POWER * torch.as_tensor(counts > 0)
    return share / share.sum()


def sampled(share: Tensor, items: Tensor, negatives: int, generator: torch.Generator) -> Candidates:
    """The `items` of a batch, seen or targets, of any shape, and `negatives` draws from the `share` (N,) of all; it and `generator`
    are on the CPU.

    Sampled softmax with logQ correction (Bengio and Senecal, 2008). What is shown stands for itself alone, so that no item is both
    counted and corrected for (the flaw of the plain form: Khrylchenko et al., arXiv 2507.09331), and the sum over the
    candidates is an unbiased estimate of the sum over all items.
    """
    draws = torch.multinomial(share, negatives, replacement=True, generator=generator)
    drawn, times = draws.unique(return_counts=True)  # type: ignore[no-untyped-call]
    shown = items[items != PAD].cpu().unique()  # type: ignore[no-untyped-call]
    rest = ~torch.isin(drawn, shown)
    correction = (times[rest] / (negatives * share[drawn[rest]])).log().float()
    found, order = torch.cat([shown, drawn[rest]]).sort()
    return Candidates(found.to(items.device), torch.cat([torch.zeros(len(shown)), correction])[order].to(items.device))


def drawn_evenly(known: Tensor, targets: Tensor, negatives: int, calibration: float, generator: torch.Generator) -> Candidates:
    """For gBCE (gSASRec: Petrov and Macdonald, RecSys 2023): the targets of a batch, (B, L), and `negatives` of the items of the
    training sessions, `known` (N,) bool, each as likely as any, from a generator on the CPU.

    Of few negatives a binary cross-entropy learns that whatever it sees is likely. So the target's probability is raised to
    beta = 1 - t (1 - a), where a is the share of the items that is drawn and t the `calibration`: 0 is the plain loss, and with 1
    probabilities are what they were without sampling. Departure: all cases of a step have the same negatives. A target
    that was not drawn is a negative of no case: it is corrected by -inf.
    """
    there = known.nonzero()[:, 0].cpu()
    drawn = there[torch.randperm(len(there), generator=generator)[:negatives]]
    items = torch.cat([drawn, targets[targets != PAD].cpu()]).unique()  # type: ignore[no-untyped-call]
    correction = torch.where(torch.isin(items, drawn), 0.0, -torch.inf)
    beta = 1 - calibration * (1 - len(drawn) / len(there))
    return Candidates(items.to(targets.device), correction.to(targets.device), beta)
