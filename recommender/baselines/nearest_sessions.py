"""Baselines of nearest sessions: SKNN and VSKNN."""

from typing import NamedTuple

import numpy as np

from recommender.baselines.counts import Entries, Scorer, expand, latest, popular_share, summed
from recommender.session_model.windows import PAD


def session_knn(rows: np.ndarray, offsets: np.ndarray, items: int, neighbours: int = 100, recent: int = 1000) -> Scorer:
    """SKNN: the items of the `neighbours` training sessions most alike (cosine of item sets) among the `recent` ones
    that share an item, weighted by that likeness (Jannach and Ludewig, RecSys 2017)."""
    held = Sets(rows, offsets, items)

    def added(prefixes: np.ndarray) -> Entries:
        case, row, _ = latest(prefixes, items)
        found = held.sharing(case, row, np.ones(len(case)), recent)
        likeness = found.overlap / np.sqrt(np.bincount(case, minlength=len(prefixes))[found.case] * held.size[found.session])
        return held.items_of(found, likeness, likeness, neighbours)

    return Scorer(popular_share(rows, items), added)


def vector_knn(rows: np.ndarray, offsets: np.ndarray, items: int, neighbours: int = 100, recent: int = 1000) -> Scorer:
    """VSKNN: as SKNN, but the later an item stands in the session, the more sharing it counts, falling linearly from 1 for the
    last one; and a neighbour counts less the further back the last item it shares (1 / steps), as in the authors' code
    (Ludewig and Jannach, UMUAI 2018)."""
    held = Sets(rows, offsets, items)

    def added(prefixes: np.ndarray) -> Entries:
        case, row, place = latest(prefixes, items)
        length = (prefixes != PAD).sum(1)
        found = held.sharing(case, row, place / length[case], recent)
        steps = 1 + length[found.case] * (1 - found.nearest)
        return held.items_of(found, found.overlap, found.overlap / steps, neighbours)

    return Scorer(popular_share(rows, items), added)


class Found(NamedTuple):
    """Training sessions that share an item with a prefix."""

    case: np.ndarray  # (F,) ascending
    session: np.ndarray  # (F,) ascending in a case
    overlap: np.ndarray  # (F,) sum of the shared items' weights
    nearest: np.ndarray  # (F,) the largest of them


class Sets:
    """The items of each training session, once, and the sessions of each item, oldest first: numbers rise with time."""

    def __init__(self, rows: np.ndarray, offsets: np.ndarray, items: int) -> None:
        self.items, self.sessions = items, len(offsets) - 1
        session = np.repeat(np.arange(self.sessions), np.diff(offsets))
        session, self.row, _ = summed(session, rows, np.ones(len(rows)), items)
        self.size = np.bincount(session, minlength=self.sessions)
        self.first = np.searchsorted(session, np.arange(len(offsets)))  # items of a session: row[first[s]:first[s + 1]]
        by_row = np.argsort(self.row, kind="stable")
        self.holder, self.begin = session[by_row], np.searchsorted(self.row[by_row], np.arange(items + 1))

    def sharing(self, case: np.ndarray, row: np.ndarray, weight: np.ndarray, recent: int) -> Found:
        """The last `recent` sessions with one of each case's items."""
        stop = self.begin[row + 1]
        line, entry = expand(np.maximum(self.begin[row], stop - recent), stop)  # older ones are not among the recent
        key, run = np.unique(case[line] * self.sessions + self.holder[entry], return_inverse=True)
        nearest = np.zeros(len(key))
        np.maximum.at(nearest, run, weight[line])
        every = Found(key // self.sessions, key % self.sessions, np.bincount(run, weight[line], len(key)), nearest)
        to_go = np.searchsorted(every.case, every.case, "right") - np.arange(len(key))  # more recent ones of the case, and itself
        return Found(*(array[to_go <= recent] for array in every))

    def items_of(self, found: Found, likeness: np.ndarray, value: np.ndarray, neighbours: int) -> Entries:
        """The items of each case's `neighbours` sessions most alike, with the `value` of all that have them. Of those equally
        alike the more recent ones are taken."""
        order = np.lexsort((-found.session, -likeness, found.case))
        begin = np.searchsorted(found.case, found.case)
        best = order[np.arange(len(order)) - begin < neighbours]
        line, entry = expand(self.first[found.session[best]], self.first[found.session[best] + 1])
        return summed(found.case[best][line], self.row[entry], value[best][line], self.items)
