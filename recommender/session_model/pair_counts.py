"""Which items stood near which in the training sessions: the part of the session model that counts instead of learning."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recommender.session_model.config import NEVER
from recommender.session_model.ops import causal, find, steps_back
from recommender.session_model.windows import PAD


class Pairs(nn.Module):
    """How often an item stood so many `steps` after another one in the training sessions: a sparse table.

    Steps of (1,) give the followers of an item; several, negative ones too, its companions, the evidence of nearest-session
    methods (Ludewig and Jannach, UMUAI 2018) as a table. Shares are discounted, (count - d) / (total - d * distinct) with one
    learned d, as Kneser and Ney (ICASSP 1995) do for words: most of what was seen once is what the other components
    explain, and what came again is not.
    """

    keys: Tensor  # (P,) int64: row * items + other, ascending
    counts: Tensor  # (P,)
    totals: Tensor  # (N,)
    distinct: Tensor  # (N,) different other items

    def __init__(self, rows: np.ndarray, offsets: np.ndarray, items: int, max_prefix: int, steps: Sequence[int]) -> None:
        super().__init__()
        self.items, self.steps = items, tuple(steps)
        keys, counts = np.unique(np.concatenate([pairs(rows, offsets, items, step) for step in steps]), return_counts=True)
        self.register_buffer("keys", torch.as_tensor(keys))
        self.register_buffer("counts", torch.as_tensor(counts, dtype=torch.float32))
        totals, distinct = tally(self.keys, self.counts, items)
        self.register_buffer("totals", totals)
        self.register_buffer("distinct", distinct)
        self.discount = nn.Parameter(torch.zeros(()))  # the logit of d
        self.recency = nn.Parameter(torch.zeros(max_prefix))
        self.evidence = nn.Parameter(torch.tensor([-1.0, 0.3]))  # weight: constant, and per log of the item's pairs
        with torch.no_grad():
            self.recency[0] = 2.0

    def forward(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) windows -> share of each item of the window, and of the target after it, among the other items of each position's
        item, (B, L, L + 1), and log-weights (B, L, L). The window's own pairs are taken out: a session must not be its own evidence."""
        _, _, count, total, distinct = self.without(rows, targets)
        return self.share(count, total[..., None], distinct[..., None]), self.weights(rows, total)

    def without(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of (B, L) windows: their items with the last target, (B, L + 1); how often each has one of these, v, so many steps after the
        item of a position, s, and how often the other windows have the one item after the other, (B, L, L + 1) both; and what the
        item of each position has of pairs and of different others there, (B, L) both."""
        after = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], PAD)], 1)
        whole = torch.cat([rows[:, :1], torch.where(targets != PAD, targets, after)], 1)  # (B, L + 1) the window and its last target
        real = (whole != PAD)[:, None, :].float()
        place = torch.arange(whole.shape[1], device=rows.device)
        near = torch.zeros(len(place), len(place), device=rows.device)
        for step in self.steps:
            near += place[None, :] - place[:, None] == step
        same = (rows[:, :, None] == whole[:, None, :]) * real  # (s, u)
        own = (same @ near) * real  # (s, v) how often the window has v `steps` after the item of s
        here = own @ (whole[:, :, None] == whole[:, None, :]).float()  # (s, v) as own, by the item of v
        count = self.count(rows[:, :, None], whole[:, None, :]) - here
        only_here = (count <= 0) / here.clamp(min=1)  # each pair known from this window alone sums to 1
        total = self.totals[rows.clamp(min=0)] - own.sum(-1)
        distinct = self.distinct[rows.clamp(min=0)] - (own * only_here).sum(-1)
        return whole, own, count, total, distinct

    def count(self, rows: Tensor, others: Tensor) -> Tensor:
        """How often each of `others` stood by each of `rows`, in the shape the two broadcast to."""
        keys = rows.clamp(min=0).long() * self.items + others.clamp(min=0).long()
        if not len(self.keys):  # of a catalogue no two of whose items were ever near
            return torch.zeros(keys.shape, device=keys.device)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where(self.keys[place] == keys, self.counts[place], 0.0)

    def share(self, count: Tensor, total: Tensor, distinct: Tensor) -> Tensor:
        return (count - self.discount.sigmoid()).clamp(min=0) / self.whole(total, distinct)

    def whole(self, total: Tensor, distinct: Tensor) -> Tensor:
        """What a discounted count is a share of."""
        return (total - self.discount.sigmoid() * distinct).clamp(min=1e-6)

    def weights(self, rows: Tensor, total: Tensor | None = None) -> Tensor:
        """Log-weights (B, L, L) of the positions' items, given how many pairs (B, L) speak for each; None: all there are."""
        total = self.totals[rows.clamp(min=0)] if total is None else total
        trust = (self.evidence[0] + self.evidence[1] * total.clamp(min=1).log()).masked_fill(total < 1, NEVER)
        open_ = causal(rows.shape[1], rows.device) & (rows != PAD)[:, None, :]
        return (trust[:, None, :] + self.recency[steps_back(rows.shape[1], rows.device)]).masked_fill(~open_, NEVER)

    def resize(self, pairs: int) -> None:
        """Makes room for so many pairs, to be filled by `load_state_dict`."""
        self.keys, self.counts = torch.zeros(pairs, dtype=torch.int64), torch.zeros(pairs)

    def over(self, place: Tensor, items: int) -> dict[str, Tensor]:
        """The buffers of the table over another catalogue, in which an item stands at `place` (N,), -1: it is gone."""
        ends = torch.stack([place[self.keys // self.items], place[self.keys % self.items]])
        kept = (ends >= 0).all(0)
        keys, order = (ends[0] * items + ends[1])[kept].sort()
        counts = self.counts[kept][order]
        totals, distinct = tally(keys, counts, items)
        return {"keys": keys, "counts": counts, "totals": totals, "distinct": distinct}

    def plus(self, rows: np.ndarray, offsets: np.ndarray) -> dict[str, Tensor]:
        """The buffers of the table with the pairs of more sessions."""
        more = torch.as_tensor(np.concatenate([pairs(rows, offsets, self.items, step) for step in self.steps]))
        keys, place = torch.cat([self.keys, more]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        counts = torch.bincount(place, weights=torch.cat([self.counts, torch.ones(len(more))]), minlength=len(keys)).float()
        totals, distinct = tally(keys, counts, self.items)
        return {"keys": keys, "counts": counts, "totals": totals, "distinct": distinct}

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(R,) items -> for each of their entries in the table: (which of the R, which entry)."""
        begin = torch.searchsorted(self.keys, rows.long() * self.items)
        length = torch.searchsorted(self.keys, (rows.long() + 1) * self.items) - begin
        line = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), length)
        return line, torch.arange(len(line), device=rows.device) + (begin - (length.cumsum(0) - length)).index_select(0, line)

    def add(self, scores: Tensor, rows: Tensor, weights: Tensor, items: Tensor | None = None) -> None:
        """Adds to scores (B, C, N), or (B, C, M) of `items`, each event's weight, events (B, L) and weights (B, C, L), times the
        shares of its other items. The C positions that are asked for stand in their order, none weighs an event after it."""
        (windows, asked, length), wide = weights.shape, scores.shape[2]
        events = rows.T.flatten()  # position by position, so that those up to one of them come first
        line, entry = self.entries(events)
        first = torch.arange(windows, device=rows.device).repeat(length) * (asked * wide)  # of the window's scores
        place, value = self.keys.index_select(0, entry), self.counts.index_select(0, entry) - self.discount.sigmoid()
        if items is None:
            place += (first - events * self.items).index_select(0, line)
        else:
            place, there = find(items, place - (events * self.items).index_select(0, line), torch.ones_like(place, dtype=torch.bool))
            place, value = place + first.index_select(0, line), value * there
        event = rows.clamp(min=0)
        weights = weights / self.whole(self.totals[event], self.distinct[event])[:, None]
        weights = weights.permute(1, 2, 0).flatten(1)  # (C, L * B)
        ends = torch.searchsorted(line, torch.arange(1, length + 1, device=rows.device) * windows).tolist()
        for n, weight in enumerate(weights):
            end = ends[length - asked + n]  # positions after it are asked for too
            scores.view(-1)[n * wide :].scatter_add_(0, place[:end], weight.index_select(0, line[:end]).mul_(value[:end]))


def pairs(rows: np.ndarray, offsets: np.ndarray, items: int, step: int) -> np.ndarray:
    """Keys (row * items + other) of all pairs so far apart inside a session, (P,) int64."""
    session = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    gap = min(abs(step), len(rows))
    inside = session[gap:] == session[: len(rows) - gap]
    first, second = rows[: len(rows) - gap][inside].astype(np.int64), rows[gap:][inside].astype(np.int64)
    keys: np.ndarray = first * items + second if step > 0 else second * items + first
    return keys


def tally(keys: Tensor, counts: Tensor, items: int) -> tuple[Tensor, Tensor]:
    """How many pairs start at each item, and with how many different others, both (N,)."""
    source = keys // items
    return torch.bincount(source, weights=counts, minlength=items).float(), torch.bincount(source, minlength=items).float()
