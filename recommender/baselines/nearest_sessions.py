"""Scores items by the nearest training sessions: SKNN and VSKNN."""

from typing import NamedTuple

import numpy as np

from recommender.baselines.counts import Entries, Scorer, expand, latest, popular_share, summed
from recommender.session_model.windows import PAD


def session_knn(rows: np.ndarray, offsets: np.ndarray, items: int, neighbours: int = 100, recent: int = 1000) -> Scorer:
    """Builds SKNN (Jannach and Ludewig, RecSys 2017): of the last `recent` training sessions that share an item with the prefix, the
    `neighbours` most similar ones (cosine of item sets) give their items that similarity."""
    sets = SessionSets(rows, offsets, items)

    def evidence(prefixes: np.ndarray) -> Entries:
        case, row, _ = latest(prefixes, items)
        shared = sets.sharing(case, row, np.ones(len(case)), recent)
        similarity = shared.overlap / np.sqrt(np.bincount(case, minlength=len(prefixes))[shared.case] * sets.size[shared.session])
        return sets.items_of(shared, similarity, similarity, neighbours)

    return Scorer(popular_share(rows, items), evidence)


def vector_knn(rows: np.ndarray, offsets: np.ndarray, items: int, neighbours: int = 100, recent: int = 1000) -> Scorer:
    """Builds VSKNN (Ludewig and Jannach, UMUAI 2018): as SKNN, but shared items have weights, from 1 for the last item of the prefix
    linearly down to the first; similarity is the sum of these weights, and a neighbour's items get it divided by the steps back to the last
    shared item, as in the authors' code."""
    sets = SessionSets(rows, offsets, items)

    def evidence(prefixes: np.ndarray) -> Entries:
        case, row, place = latest(prefixes, items)
        length = (prefixes != PAD).sum(1)
        shared = sets.sharing(case, row, place / length[case], recent)
        steps = 1 + length[shared.case] * (1 - shared.nearest)
        return sets.items_of(shared, shared.overlap, shared.overlap / steps, neighbours)

    return Scorer(popular_share(rows, items), evidence)


class SharedSessions(NamedTuple):
    """Holds the training sessions that share an item with a prefix."""

    case: np.ndarray  # (S,) index of the prefix, ascending
    session: np.ndarray  # (S,) ascending within a case
    overlap: np.ndarray  # (S,) sum of the shared items' weights
    nearest: np.ndarray  # (S,) largest of these weights


class SessionSets:
    """Indexes the distinct items of each training session and the sessions of each item; session numbers rise with time."""

    def __init__(self, rows: np.ndarray, offsets: np.ndarray, items: int) -> None:
        self.items, self.sessions = items, len(offsets) - 1
        session = np.repeat(np.arange(self.sessions), np.diff(offsets))
        session, self.row, _ = summed(session, rows, np.ones(len(rows)), items)
        self.size = np.bincount(session, minlength=self.sessions)
        self.first = np.searchsorted(session, np.arange(len(offsets)))  # items of a session: row[first[s]:first[s + 1]]
        by_row = np.argsort(self.row, kind="stable")
        self.holder, self.begin = session[by_row], np.searchsorted(self.row[by_row], np.arange(items + 1))

    def sharing(self, case: np.ndarray, row: np.ndarray, weight: np.ndarray, recent: int) -> SharedSessions:
        """Finds for each case the last `recent` sessions that have one of its items; case, row and weight are those of the cases' items."""
        stop = self.begin[row + 1]
        line, entry = expand(np.maximum(self.begin[row], stop - recent), stop)  # older sessions of an item are not among the last `recent`
        key, run = np.unique(case[line] * self.sessions + self.holder[entry], return_inverse=True)
        nearest = np.zeros(len(key))
        np.maximum.at(nearest, run, weight[line])
        all_shared = SharedSessions(key // self.sessions, key % self.sessions, np.bincount(run, weight[line], len(key)), nearest)
        position = np.searchsorted(all_shared.case, all_shared.case, "right") - np.arange(
            len(key)
        )  # within the case, from the most recent: 1, 2, ...
        return SharedSessions(*(array[position <= recent] for array in all_shared))

    def items_of(self, shared: SharedSessions, similarity: np.ndarray, value: np.ndarray, neighbours: int) -> Entries:
        """Sums over the `neighbours` most similar sessions of each case their `value` (S,) for each of their items. Of equally similar
        sessions the more recent ones are taken."""
        order = np.lexsort((-shared.session, -similarity, shared.case))
        begin = np.searchsorted(shared.case, shared.case)
        best = order[np.arange(len(order)) - begin < neighbours]
        line, entry = expand(self.first[shared.session[best]], self.first[shared.session[best] + 1])
        return summed(shared.case[best][line], self.row[entry], value[best][line], self.items)
