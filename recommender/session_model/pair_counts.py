"""Counts which items stood near which in the training sessions: the next-item counts and the co-occurrence counts."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recommender.session_model.config import LOG_ZERO, Parts
from recommender.session_model.ops import causal, find, steps_back
from recommender.session_model.windows import PAD


class PairCounts(nn.Module):
    """Counts, in a sparse table, how often an item stood `steps` after another one in the training sessions.

    Steps of (1,) give next-item counts. Several steps, negative ones too, give co-occurrence counts: the evidence of nearest-session
    methods (Ludewig and Jannach, UMUAI 2018) as a table. The share of item j among the pairs of item i is discounted as Kneser and Ney
    (ICASSP 1995) do for words,

        P(j | i) = max(count(i, j) - d, 0) / (total(i) - d * distinct(i)),

    with one learned d in (0, 1): a pair seen once is mostly explained by the other components, a pair seen repeatedly is not.
    """

    keys: Tensor  # (P,) int64: row * items + other row, ascending
    counts: Tensor  # (P,)
    totals: Tensor  # (N,) pairs of each item
    distinct: Tensor  # (N,) different other items

    def __init__(self, rows: np.ndarray, offsets: np.ndarray, items: int, max_prefix: int, steps: Sequence[int]) -> None:
        super().__init__()
        self.items, self.steps = items, tuple(steps)
        keys, counts = np.unique(np.concatenate([pair_keys(rows, offsets, items, step) for step in steps]), return_counts=True)
        self.register_buffer("keys", torch.as_tensor(keys))
        self.register_buffer("counts", torch.as_tensor(counts, dtype=torch.float32))
        totals, distinct = pair_totals(self.keys, self.counts, items)
        self.register_buffer("totals", totals)
        self.register_buffer("distinct", distinct)
        self.discount = nn.Parameter(torch.zeros(()))  # logit of d
        self.recency = nn.Parameter(torch.zeros(max_prefix))
        self.evidence = nn.Parameter(torch.tensor([-1.0, 0.3]))  # log-weight of an item: constant, and slope in the log of its pairs
        with torch.no_grad():
            self.recency[0] = 2.0

    def forward(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the shares of the training: windows rows (B, L) and targets (B, L) -> P(v | item of position s) for each item v of the
        window and its last target, (B, L, L + 1), and log-weights (B, L, L).

        The pairs of the window itself are subtracted from the counts: a session must not be its own evidence.
        """
        count, total, distinct = self.counts_without(rows, targets)
        return self.share(count, total[..., None], distinct[..., None]), self.weights(rows, total)

    def counts_without(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts pairs without those of the window itself: of rows and targets (B, L), the pairs of the item at position s with each item v
        of the window and its last target, (B, L, L + 1), and the totals and distinct others of the item at s, (B, L) both."""
        after = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], PAD)], 1)
        window = torch.cat([rows[:, :1], torch.where(targets != PAD, targets, after)], 1)  # (B, L + 1) the items and the last target
        real = (window != PAD)[:, None, :].float()
        place = torch.arange(window.shape[1], device=rows.device)
        step_counts = torch.zeros(len(place), len(place), device=rows.device)
        for step in self.steps:
            step_counts += place[None, :] - place[:, None] == step
        same = (rows[:, :, None] == window[:, None, :]) * real  # (s, u)
        places_near = (same @ step_counts) * real  # (s, v): how often place v lies `steps` after an occurrence of the item of s
        window_count = places_near @ (window[:, :, None] == window[:, None, :]).float()  # (s, v) the same, summed over places with v's item
        count = self.count(rows[:, :, None], window[:, None, :]) - window_count
        only_here = (count <= 0) / window_count.clamp(min=1)  # sums to 1 over the places of each pair that no other window has
        total = self.totals[rows.clamp(min=0)] - places_near.sum(-1)
        distinct = self.distinct[rows.clamp(min=0)] - (places_near * only_here).sum(-1)
        return count, total, distinct

    def count(self, rows: Tensor, others: Tensor) -> Tensor:
        """Looks up the counts of the pairs (row, other); the two shapes are broadcast."""
        keys = rows.clamp(min=0).long() * self.items + others.clamp(min=0).long()
        if not len(self.keys):  # no training session had two items
            return torch.zeros(keys.shape, device=keys.device)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[place] == keys, self.counts[place], 0.0)

    def share(self, count: Tensor, total: Tensor, distinct: Tensor) -> Tensor:
        """Computes P(j | i) from the numbers of the formula."""
        return (count - self.discount.sigmoid()).clamp(min=0) / self.discounted_total(total, distinct)

    def discounted_total(self, total: Tensor, distinct: Tensor) -> Tensor:
        """Computes the denominator of P(j | i)."""
        return (total - self.discount.sigmoid() * distinct).clamp(min=1e-6)

    def weights(self, rows: Tensor, total: Tensor | None = None) -> Tensor:
        """Computes log-weights (B, L, L) of the positions' items from their numbers of pairs `total` (B, L); None: those of the table."""
        total = self.totals[rows.clamp(min=0)] if total is None else total
        evidence = (self.evidence[0] + self.evidence[1] * total.clamp(min=1).log()).masked_fill(total < 1, LOG_ZERO)
        mask = causal(rows.shape[1], rows.device) & (rows != PAD)[:, None, :]
        return (evidence[:, None, :] + self.recency[steps_back(rows.shape[1], rows.device)]).masked_fill(~mask, LOG_ZERO)

    def resize(self, pairs: int) -> None:
        """Allocates the table for `pairs` pairs, to be filled by `load_state_dict`."""
        self.keys, self.counts = torch.zeros(pairs, dtype=torch.int64), torch.zeros(pairs)

    def over(self, place: Tensor, items: int) -> dict[str, Tensor]:
        """Returns the buffers for another catalogue of `items` items, where those here have the rows `place` (N,), -1: none."""
        ends = torch.stack([place[self.keys // self.items], place[self.keys % self.items]])
        present = (ends >= 0).all(0)
        keys, order = (ends[0] * items + ends[1])[present].sort()
        counts = self.counts[present][order]
        totals, distinct = pair_totals(keys, counts, items)
        return {"keys": keys, "counts": counts, "totals": totals, "distinct": distinct}

    def plus(self, rows: np.ndarray, offsets: np.ndarray) -> dict[str, Tensor]:
        """Returns the buffers of the table with the pairs of more sessions added."""
        more = torch.as_tensor(np.concatenate([pair_keys(rows, offsets, self.items, step) for step in self.steps]))
        keys, place = torch.cat([self.keys, more]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        counts = torch.bincount(place, weights=torch.cat([self.counts, torch.ones(len(more))]), minlength=len(keys)).float()
        totals, distinct = pair_totals(keys, counts, self.items)
        return {"keys": keys, "counts": counts, "totals": totals, "distinct": distinct}

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Lists the table's entries of the items rows (R,): for each entry the index in `rows` and the index in the table."""
        begin = torch.searchsorted(self.keys, rows.long() * self.items)
        length = torch.searchsorted(self.keys, (rows.long() + 1) * self.items) - begin
        line = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), length)
        return line, torch.arange(len(line), device=rows.device) + (begin - (length.cumsum(0) - length)).index_select(0, line)

    def add(self, scores: Tensor, rows: Tensor, weights: Tensor, items: Tensor | None = None) -> None:
        """Adds to the scores, in place: scores[b, c, j] += sum over events s <= c of weights[b, c, s] * P(j | item of s).

        scores (B, C, N), or (B, C, M) of `items` (M,), ascending; rows (B, L); weights (B, C, L). The C positions are the last ones of the
        window, in order. It is a sparse scatter-add over the table's entries of the events.
        """
        (windows, positions, length), wide = weights.shape, scores.shape[2]
        events = rows.T.flatten()  # position by position, so that the events up to a position come first
        line, entry = self.entries(events)
        first = torch.arange(windows, device=rows.device).repeat(length) * (positions * wide)  # index of the window's first score
        place, value = self.keys.index_select(0, entry), self.counts.index_select(0, entry) - self.discount.sigmoid()
        if items is None:
            place += (first - events * self.items).index_select(0, line)
        else:
            place, scored = find(items, place - (events * self.items).index_select(0, line), torch.ones_like(place, dtype=torch.bool))
            place, value = place + first.index_select(0, line), value * scored
        event = rows.clamp(min=0)
        weights = weights / self.discounted_total(self.totals[event], self.distinct[event])[:, None]
        weights = weights.permute(1, 2, 0).flatten(1)  # (C, L * B)
        ends = torch.searchsorted(line, torch.arange(1, length + 1, device=rows.device) * windows).tolist()
        for n, weight in enumerate(weights):
            end = ends[length - positions + n]  # entries of events after this position are left out
            scores.view(-1)[n * wide :].scatter_add_(0, place[:end], weight.index_select(0, line[:end]).mul_(value[:end]))


def pair_keys(rows: np.ndarray, offsets: np.ndarray, items: int, step: int) -> np.ndarray:
    """Lists the keys (row * items + other row) of all pairs of events `step` apart inside a session, (P,) int64."""
    session = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    gap = min(abs(step), len(rows))
    inside = session[gap:] == session[: len(rows) - gap]
    first, second = rows[: len(rows) - gap][inside].astype(np.int64), rows[gap:][inside].astype(np.int64)
    keys: np.ndarray = first * items + second if step > 0 else second * items + first
    return keys


def pair_totals(keys: Tensor, counts: Tensor, items: int) -> tuple[Tensor, Tensor]:
    """Sums the pairs of each item, and counts its different others: (N,) both."""
    source = keys // items
    return torch.bincount(source, weights=counts, minlength=items).float(), torch.bincount(source, minlength=items).float()


def pair_steps(parts: Parts) -> dict[str, list[int]]:
    """Lists the distances in steps that the next-item counts and the co-occurrence counts count; those that are switched on."""
    steps = {"next_item_counts": [1]} if parts.followers else {}
    nearby = [step for step in range(-parts.companions, parts.companions + 1) if step not in (0, *steps.get("next_item_counts", []))]
    return steps | ({"cooccurrence_counts": nearby} if nearby else {})
