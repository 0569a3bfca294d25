"""Scores items by counts: popularity, repeats of the session's items, co-occurrence.

The evidence of a prefix concerns few items. All others have their base score: popularity, scaled below any evidence, so that no ranking
ends in catalogue order. So the rank of a target and the top-k need those few items and a search in the sorted base scores, never the
scores of all items.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from recommender.session_model.windows import PAD


class Entries(NamedTuple):
    """Holds the scores that a batch of prefixes adds to some items: not negative, each pair (case, row) once."""

    case: np.ndarray  # (E,) index of the prefix, ascending
    row: np.ndarray  # (E,) item, ascending within a case
    value: np.ndarray  # (E,) float32


@dataclass(frozen=True)
class Scorer:
    """Scores all items for a batch of prefixes (B, L), padded with -1 on the right."""

    base: np.ndarray  # (N,) float32 base scores, the same for every prefix
    evidence: Callable[[np.ndarray], Entries]

    def __call__(self, prefixes: np.ndarray) -> np.ndarray:
        """Computes scores (B, N)."""
        scores = np.tile(self.base, (len(prefixes), 1))
        case, row, value = self.evidence(prefixes)
        scores[case, row] += value
        return scores

    def top(self, prefixes: np.ndarray, k: int) -> np.ndarray:
        """Ranks the k best items of each prefix: rows (B, k). Candidates are the items with evidence and the k best base scores."""
        case, row, value = self.evidence(prefixes)
        first = np.argsort(-self.base, kind="stable")[:k]
        first_case, first_row = np.repeat(np.arange(len(prefixes)), len(first)), np.tile(first, len(prefixes))
        value = np.concatenate([value, np.zeros(len(first_row))])
        case, row, value = summed(np.concatenate([case, first_case]), np.concatenate([row, first_row]), value, len(self.base))
        order = np.lexsort((row, -(self.base[row] + value), case))
        place = np.arange(len(case)) - np.searchsorted(case, case)
        return row[order][place < k].reshape(len(prefixes), -1)

    def ranks(self, prefixes: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Computes the ranks (B,) of the targets (B,), as `ranks.target_ranks` does from all scores; tied items share their mean rank."""
        case, row, value = self.evidence(prefixes)
        before, after = self.base[row], self.base[row] + value
        target_scores = self.base[targets]
        hit = row == targets[case]
        target_scores[case[hit]] = after[hit]
        in_order = np.sort(self.base)
        greater = len(in_order) - np.searchsorted(in_order, target_scores, "right")
        equal = len(in_order) - np.searchsorted(in_order, target_scores, "left") - greater
        target_score = target_scores[case]
        greater += count(case, (after > target_score).astype(int) - (before > target_score), len(targets))
        equal += count(case, (after == target_score).astype(int) - (before == target_score), len(targets))
        return np.asarray(1 + greater + (equal - 1) / 2)


def popularity(rows: np.ndarray, offsets: np.ndarray, items: int, starts: np.ndarray | None = None) -> Scorer:
    """Builds the popularity baseline: training events of each item, the same for every session."""
    no_evidence = Entries(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    return Scorer(np.bincount(rows, minlength=items).astype(np.float32), lambda prefixes: no_evidence)


def session_popularity(rows: np.ndarray, offsets: np.ndarray, items: int, starts: np.ndarray | None = None) -> Scorer:
    """Builds S-POP: how often each item is in the prefix (Hidasi et al., ICLR 2016)."""

    def evidence(prefixes: np.ndarray) -> Entries:
        case, place = np.nonzero(prefixes != PAD)
        return summed(case, prefixes[case, place], np.ones(len(case)), items)

    return Scorer(popular_share(rows, items), evidence)


def last_item_repeat(rows: np.ndarray, offsets: np.ndarray, items: int, starts: np.ndarray | None = None) -> Scorer:
    """Builds last-item repeat: the items of the prefix, latest first, then the most popular items."""
    return Scorer(popular_share(rows, items), lambda prefixes: latest(prefixes, items))


def co_occurrence(rows: np.ndarray, offsets: np.ndarray, items: int, starts: np.ndarray | None = None) -> Scorer:
    """Builds co-occurrence: how often each item directly followed the prefix's last item in training."""
    inside = np.ones(max(len(rows) - 1, 0), bool)
    inside[offsets[1:-1] - 1] = False  # pairs across two sessions
    source, follower, times = summed(rows[:-1][inside], rows[1:][inside], np.ones(inside.sum()), items)
    begin = np.searchsorted(source, np.arange(items + 1))

    def evidence(prefixes: np.ndarray) -> Entries:
        length = (prefixes != PAD).sum(1)
        case = np.flatnonzero(length)
        last = prefixes[case, length[case] - 1]
        line, entry = expand(begin[last], begin[last + 1])
        return Entries(case[line], follower[entry], times[entry])

    return Scorer(popular_share(rows, items), evidence)


def latest(prefixes: np.ndarray, items: int) -> Entries:
    """Finds the last position, counted from 1, of each item of each prefix."""
    case, place = np.nonzero(prefixes != PAD)
    key, reversed_index = np.unique((case.astype(np.int64) * items + prefixes[case, place])[::-1], return_index=True)
    return Entries(key // items, key % items, (place[::-1][reversed_index] + 1).astype(np.float32))


def popular_share(rows: np.ndarray, items: int) -> np.ndarray:
    """Scales popularity (N,) below any count, and below any similarity of prefixes of up to 31 items."""
    counts = np.bincount(rows, minlength=items).astype(np.float32)
    return counts / (1000 * max(float(counts.max(initial=0)), 1.0))


def above_popularity(entries: Entries) -> Entries:
    """Scales evidence of any size, in the same order, into 0.001 to 1: so a thousandth of `popular_share` stays below all of it.

    v becomes 1 / (1 + log(greatest of the case / v)); evidence that underflowed to 0 is left out."""
    case, row, value = (array[entries.value > 0] for array in entries)
    begin = np.flatnonzero(np.diff(case, prepend=-1))
    greatest = np.repeat(np.maximum.reduceat(value, begin), np.diff(begin, append=len(value))) if len(value) else value
    return Entries(case, row, (1 / (1 + np.log(greatest.astype(np.float64) / value))).astype(np.float32))


def summed(case: np.ndarray, row: np.ndarray, value: np.ndarray, items: int) -> Entries:
    """Sums the values of equal pairs (case, row); the pairs are sorted."""
    key, place = np.unique(case.astype(np.int64) * items + row, return_inverse=True)
    return Entries(key // items, key % items, np.bincount(place, value, len(key)).astype(np.float32))


def count(case: np.ndarray, value: np.ndarray, cases: int) -> np.ndarray:
    """Sums the values of each case: (cases,)."""
    return np.bincount(case, value, cases).astype(np.int64)


def expand(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expands ranges start[i]:stop[i]: for each of their elements, the number of the range and the element."""
    length = stop - start
    line = np.repeat(np.arange(len(start)), length)
    return line, np.arange(len(line)) - np.repeat(np.cumsum(length) - length, length) + start[line]
