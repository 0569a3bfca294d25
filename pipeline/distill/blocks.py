"""Draws blocks of items for the transfer phase, and computes the loss of all transitions within a block.

A step encodes each item of a block once, and learns from every pair of the training sessions that lies in the block: thousands of pairs,
where a session prompt asks for one item after each of its own (item-to-item training, as in beeFormer, arXiv 2409.10309). Features of
earlier steps are no candidates: as the weights change with every step, they misled the training (docs/experiments.md).
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import DATA, UserError
from pipeline.data.session_log import SessionLog
from pipeline.distill.closed_form import transition_counts

ITSELF = -1e4  # logit of an item after itself


class Blocks:
    """Draws blocks of about `size` items, half of them from whole sessions and half at random, with the transitions between them.

    `window` and `popularity` are those of `distill.transfer`. Raises `UserError` (3) for a log without a transition.
    """

    def __init__(self, train: SessionLog, items: int, size: int, window: int, popularity: float) -> None:
        self.train, self.half = train, max(1, size // 2)
        self.counts = transition_counts(train, items, window)
        followed, following = (np.asarray(self.counts.sum(axis)) for axis in (1, 0))
        self.pairs = followed + following  # (N,) of each item
        self.known = np.flatnonzero(self.pairs)  # the items of some transition
        if not len(self.known):
            raise UserError("no training session has two different items, so there are no transitions to learn; give longer sessions", DATA)
        self.sessions = min(len(train), max(1, round(self.half * len(train) / len(train.rows))))  # of a block
        # (2, N): what is added to the logits of an item that follows, and of one that is followed
        self.bias = np.stack([popularity * np.log(np.maximum(n, 1e-9) / n.sum()) for n in (following, followed)])

    def rows(self, sessions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the items of `sessions` for a block: half of it at most."""
        rows: np.ndarray = rng.permutation(np.unique(np.concatenate([self.train.session(int(session)) for session in sessions])))
        return rows[: self.half]

    def facts(self, block: np.ndarray) -> dict[str, Tensor]:
        """Returns the rows of a block (b,), the weights of its pairs (b, b), and the biases of the logits (2, b)."""
        arrays = {"block": block, "pairs": self.counts[block][:, block].toarray(), "bias": self.bias[:, block].astype(np.float32)}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def transition_loss(query: Tensor, item: Tensor, pairs: Tensor, bias: Tensor) -> Tensor:
    """Computes the mean cross-entropy of what follows each item of a block, and of what each item follows.

    `query` (b, D) holds the scale, `item` (b, D) is L2-normalised. Row i of `pairs` (b, b) weighs the items after item i; divided by
    its sum it is the target distribution, so that no known successor counts as a negative. Targets and logits are restricted to the same
    items, so how often blocks hold an item cancels out: a correction for it (logQ) would be an error. `bias` (2, b) is the part of an
    item's log popularity that features need not express.
    """
    itself = torch.eye(len(query), dtype=torch.bool, device=query.device)
    logits = (query @ item.T).masked_fill(itself, ITSELF)
    losses = []
    for scores, targets in ((logits + bias[0], pairs), (logits.T + bias[1], pairs.T)):
        total = targets.sum(1)
        log_shares = scores[total > 0].log_softmax(1)
        losses.append(-(targets[total > 0] / total[total > 0, None] * log_shares).sum() / max(1, len(log_shares)))
    return torch.stack(losses).mean()
