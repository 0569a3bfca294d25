"""Baselines of counts: popularity, what is in the session already, co-occurrence.

What a prefix says concerns few items; all others keep what they have
without it, their popularity, far below any other evidence, so that no list ends in catalogue order. So a target's rank, and
the first of a ranking, take the few and a look into the sorted rest, and no list of all items.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recommender.session_model.windows import PAD


class Entries(NamedTuple):
    """What a batch of prefixes adds to the scores of some items, never less than nothing, no pair of case and row twice."""

    case: np.ndarray  # (E,) ascending
    row: np.ndarray  # (E,) ascending in a case
    value: np.ndarray  # (E,) float32


@dataclass(frozen=True)
class Scorer:
    """Scores of a batch of prefixes (B, L), padded with -1 on the right."""

    base: np.ndarray  # (N,) float32, whatever the prefix
    added: Callable[[np.ndarray], Entries]

    def __call__(self, prefixes: np.ndarray) -> np.ndarray:
        """(B, N)"""
        scores = np.tile(self.base, (len(prefixes), 1))
        case, row, value = self.added(prefixes)
        scores[case, row] += value
        return scores

    def top(self, prefixes: np.ndarray, k: int) -> np.ndarray:
        """Rows of the k best items of each prefix, (B, k): few have more than their base, and of all others the first k do."""
        case, row, value = self.added(prefixes)
        first = np.argsort(-self.base, kind="stable")[:k]
        every, each = np.repeat(np.arange(len(prefixes)), len(first)), np.tile(first, len(prefixes))
        value = np.concatenate([value, np.zeros(len(each))])
        case, row, value = summed(np.concatenate([case, every]), np.concatenate([row, each]), value, len(self.base))
        order = np.lexsort((row, -(self.base[row] + value), case))
        place = np.arange(len(case)) - np.searchsorted(case, case)
        return row[order][place < k].reshape(len(prefixes), -1)

    def ranks(self, prefixes: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """What `ranks.target_ranks` says of these scores, (B,)."""
        case, row, value = self.added(prefixes)
        before, after = self.base[row], self.base[row] + value
        own = self.base[targets]
        hit = row == targets[case]
        own[case[hit]] = after[hit]
        in_order = np.sort(self.base)
        greater = len(in_order) - np.searchsorted(in_order, own, "right")
        equal = len(in_order) - np.searchsorted(in_order, own, "left") - greater
        mark = own[case]
        greater += count(case, (after > mark).astype(int) - (before > mark), len(own))
        equal += count(case, (after == mark).astype(int) - (before == mark), len(own))
        return np.asarray(1 + greater + (equal - 1) / 2)


def popularity(rows: np.ndarray, items: int) -> Scorer:
    """Training events per item, whatever the session."""
    nothing = Entries(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    return Scorer(np.bincount(rows, minlength=items).astype(np.float32), lambda prefixes: nothing)


def session_popularity(rows: np.ndarray, items: int) -> Scorer:
    """S-POP: how often each item is in the session so far (Hidasi et al., ICLR 2016)."""

    def added(prefixes: np.ndarray) -> Entries:
        case, place = np.nonzero(prefixes != PAD)
        return summed(case, prefixes[case, place], np.ones(len(case)), items)

    return Scorer(popular_share(rows, items), added)


def last_item_repeat(rows: np.ndarray, items: int) -> Scorer:
    """The items of the prefix, latest first, then the popular ones."""
    return Scorer(popular_share(rows, items), lambda prefixes: latest(prefixes, items))


def co_occurrence(rows: np.ndarray, offsets: np.ndarray, items: int) -> Scorer:
    """How often each item directly followed the prefix's last one."""
    inside = np.ones(max(len(rows) - 1, 0), bool)
    inside[offsets[1:-1] - 1] = False  # pairs that straddle two sessions
    source, follower, times = summed(rows[:-1][inside], rows[1:][inside], np.ones(inside.sum()), items)
    begin = np.searchsorted(source, np.arange(items + 1))

    def added(prefixes: np.ndarray) -> Entries:
        length = (prefixes != PAD).sum(1)
        case = np.flatnonzero(length)
        last = prefixes[case, length[case] - 1]
        line, entry = expand(begin[last], begin[last + 1])
        return Entries(case[line], follower[entry], times[entry])

    return Scorer(popular_share(rows, items), added)


def latest(prefixes: np.ndarray, items: int) -> Entries:
    """The items of each prefix, with the place, from 1, that each stands at last."""
    case, place = np.nonzero(prefixes != PAD)
    key, turned = np.unique((case.astype(np.int64) * items + prefixes[case, place])[::-1], return_index=True)
    return Entries(key // items, key % items, (place[::-1][turned] + 1).astype(np.float32))


def popular_share(rows: np.ndarray, items: int) -> np.ndarray:
    """(N,) popularity scaled to stay below any count, and any likeness of prefixes of up to 31 items."""
    counts = np.bincount(rows, minlength=items).astype(np.float32)
    return counts / (1000 * max(float(counts.max(initial=0)), 1.0))


def summed(case: np.ndarray, row: np.ndarray, value: np.ndarray, items: int) -> Entries:
    """The distinct pairs, in order, with the sum of their values."""
    key, place = np.unique(case.astype(np.int64) * items + row, return_inverse=True)
    return Entries(key // items, key % items, np.bincount(place, value, len(key)).astype(np.float32))


def count(case: np.ndarray, value: np.ndarray, cases: int) -> np.ndarray:
    """(cases,) sum of the values of each case."""
    return np.bincount(case, value, cases).astype(np.int64)


def expand(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges start[i]:stop[i] written out: (which range, which entry), one element each."""
    length = stop - start
    line = np.repeat(np.arange(len(start)), length)
    return line, np.arange(len(line)) - np.repeat(np.cumsum(length) - length, length) + start[line]
