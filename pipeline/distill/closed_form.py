"""Computes the transition directions of item features in closed form: the canonical correlation of an item and its successors.

This costs one pass over the items and the decomposition of a (d, d) matrix. It is the bar that a trained transition has to pass (the
variant `closed_form` of `tpad ablate`), and the start of the heads that are trained.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor

from pipeline.data.session_log import SessionLog

WITHHELD, RANKED = 0.2, 2048  # share of the items on which settings are compared; how many of them, and of their predecessors, at most
WINDOWS, RIDGES, RANKS = (1, 3), (0.01, 0.1, 1.0), (16, 32, 64)  # the settings that are compared
LEAST_RIDGE = 1e-2  # of the linear fit, in units of the mean variance


def transition_counts(log: SessionLog, items: int, window: int) -> csr_array:
    """Counts how often item j comes up to `window` events after item i in a session, as 1 / distance: (items, items) float32.

    Pairs of an item with itself are left out.
    """
    session = log.session_of_event()
    counts = csr_array((items, items), dtype=np.float32)
    for distance in range(1, window + 1):
        earlier, later = log.rows[:-distance], log.rows[distance:]
        pair = (session[:-distance] == session[distance:]) & (earlier != later)
        weights = np.full(int(pair.sum()), 1 / distance, np.float32)
        counts = counts + csr_array((weights, (earlier[pair], later[pair])), shape=(items, items))
    return counts


@dataclass(frozen=True)
class TransitionMaps:
    """Affine maps of features (d,), the offset in their last column: of the item that a session is at, and of an item that may follow."""

    query: Tensor  # (D, d + 1)
    item: Tensor  # (D, d + 1)

    def cut(self, rank: int) -> "TransitionMaps":
        """Returns the maps to the first `rank` directions."""
        return TransitionMaps(self.query[:rank], self.item[:rank])


def closed_form(features: Tensor, counts: csr_array, rank: int, ridge: float) -> TransitionMaps:
    """Computes the canonical directions of items and their successors (Hotelling, Biometrika 1936), strongest first, `rank` at most.

    `features` (N, d); the `counts` (N, N) of transitions enter by log(1 + count), so that a few frequent pairs do not decide. C_q and C_t
    are the covariances of the features x of the items that are followed and that follow, plus `ridge` times their mean variance. With
    the singular value decomposition U S V' of C_q^(-1/2) E[x_i x_j'] C_t^(-1/2) over the pairs (i, j), the maps are
    q(x) = S^(1/2) U' C_q^(-1/2) (x - mean) and t(x) = S^(1/2) V' C_t^(-1/2) (x - mean).
    """
    weights = csr_array((np.log1p(counts.data), counts.indices, counts.indptr), shape=counts.shape)
    weights = weights / weights.sum()
    x = features.double().cpu().numpy()
    means, roots = [], []
    for share in (weights.sum(1), weights.sum(0)):
        mean = share @ x
        covariance = (x * share[:, None]).T @ x - np.outer(mean, mean)
        variances, axes = np.linalg.eigh(covariance)
        scale = 1 / np.sqrt(np.maximum(variances, 0) + ridge * max(float(variances.mean()), 1e-12))
        means.append(mean)
        roots.append((axes * scale) @ axes.T)
    left, values, right = np.linalg.svd(roots[0] @ (x.T @ (weights @ x) - np.outer(*means)) @ roots[1])
    strength = np.sqrt(values[:rank, None])
    maps = strength * left[:, :rank].T @ roots[0], strength * right[:rank] @ roots[1]
    return TransitionMaps(*(torch.from_numpy(np.column_stack([m, -m @ mean])).float() for m, mean in zip(maps, means, strict=True)))


def mapped(features: Tensor, affine: Tensor) -> Tensor:
    """Maps features (N, d) by (D, d + 1), and normalises: (N, D)."""
    return F.normalize(features.float() @ affine[:, :-1].T + affine[:, -1], dim=-1)


def chosen_closed_form(features: Tensor, log: SessionLog, dim: int, seed: int) -> tuple[TransitionMaps, int]:
    """Computes the closed form with the window and ridge that retrieve withheld items best. Returns `dim` directions and the best rank.

    A fifth of the items is withheld from the transitions; then each of their predecessors ranks them. Only training sessions are read.
    """
    counts = {window: transition_counts(log, len(features), window) for window in WINDOWS}
    following = counts[1]
    known = np.flatnonzero(following.sum(0) + following.sum(1))
    withheld = np.zeros(len(features), bool)
    withheld[np.random.default_rng(seed).permutation(known)[: int(WITHHELD * len(known))]] = True
    best, chosen = -1.0, (WINDOWS[0], RIDGES[-1], dim)
    if withheld.any():
        for window in WINDOWS:
            others = counts[window][~withheld][:, ~withheld]
            for ridge in RIDGES:
                maps = closed_form(features[torch.from_numpy(~withheld)], others, dim, ridge)
                for rank in sorted({min(rank, dim) for rank in (*RANKS, dim)}):
                    score = withheld_mrr(features, maps.cut(rank), following, withheld, seed)
                    if score > best:
                        best, chosen = score, (window, ridge, rank)
    window, ridge, rank = chosen
    return closed_form(features, counts[window], dim, ridge), rank


def withheld_mrr(features: Tensor, maps: TransitionMaps, following: csr_array, withheld: np.ndarray, seed: int) -> float:
    """Ranks the withheld items (N,) bool after each of their predecessors: the mean reciprocal rank, predecessors weighted equally."""
    rng = np.random.default_rng(seed)
    items = rng.permutation(np.flatnonzero(withheld))[:RANKED]
    predecessors = rng.permutation(np.flatnonzero(following[:, items].sum(1)))[:RANKED]
    if not len(predecessors):
        return 0.0
    scores = mapped(features[predecessors], maps.query) @ mapped(features[items], maps.item).T
    positives = torch.from_numpy(following[predecessors][:, items].toarray())
    ranks = 1 + scores.argsort(1, descending=True).argsort(1)
    return float(((positives / ranks).sum(1) / positives.sum(1)).mean())


def linear_fit(features: Tensor, targets: Tensor) -> Tensor:
    """Fits targets (N, D) by a ridge regression on features (N, d): (D, d + 1), as `mapped` takes it."""
    x, y = features.double(), targets.double()
    mean, offset = x.mean(0), y.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    covariance += LEAST_RIDGE * covariance.diagonal().mean().clamp(min=1e-6) * torch.eye(len(mean), dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(covariance, (x - mean).T @ (y - offset) / len(x)).T
    return torch.column_stack([weight, offset - weight @ mean]).float()
