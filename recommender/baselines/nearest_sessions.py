"""Scores items by the nearest training sessions: SKNN, VSKNN and SFSKNN, and the sparse products that STAN shares with them.

A batch of prefixes is a sparse matrix (B, N) of weights, the training sessions one of items (N, S): their product holds the similarity of
each prefix to each session that shares an item with it, and another product the scores of the neighbours' items.
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from recommender.baselines.counts import Entries, Scorer, latest, popular_share
from recommender.session_model.windows import PAD

FAR = 500  # positions further back than this count as this far: 4 ** -FAR is a number of float64


def session_knn(
    rows: np.ndarray, offsets: np.ndarray, items: int, starts: np.ndarray | None = None, neighbours: int = 100, recent: int = 1000
) -> Scorer:
    """Builds SKNN (Jannach and Ludewig, RecSys 2017): of the last `recent` training sessions that share an item with the prefix, the
    `neighbours` most similar ones (cosine of item sets) give their items that similarity."""
    sessions = TrainingSessions(rows, offsets, items, recent)

    def evidence(prefixes: np.ndarray) -> Entries:
        return entries_of(similar_by_cosine(sessions, prefixes, neighbours) @ sessions.items_of)

    return Scorer(popular_share(rows, items), evidence)


def sequential_filter_knn(
    rows: np.ndarray, offsets: np.ndarray, items: int, starts: np.ndarray | None = None, neighbours: int = 100, recent: int = 1000
) -> Scorer:
    """Builds SF-SKNN (Ludewig and Jannach, UMUAI 2018): as SKNN, but an item is scored only if it directly followed the prefix's last item
    in some training session."""
    sessions = TrainingSessions(rows, offsets, items, recent)
    inside = np.ones(max(len(rows) - 1, 0), bool)
    inside[offsets[1:-1] - 1] = False  # pairs across two sessions
    followers = csr_array((np.ones(inside.sum()), (rows[:-1][inside], rows[1:][inside])), shape=(items, items)).sign()

    def evidence(prefixes: np.ndarray) -> Entries:
        scores = similar_by_cosine(sessions, prefixes, neighbours) @ sessions.items_of
        length = (prefixes != PAD).sum(1)
        case = np.flatnonzero(length)
        last = csr_array((np.ones(len(case)), (case, prefixes[case, length[case] - 1])), shape=scores.shape)
        return entries_of(scores.multiply(last @ followers).tocsr())

    return Scorer(popular_share(rows, items), evidence)


def vector_knn(
    rows: np.ndarray, offsets: np.ndarray, items: int, starts: np.ndarray | None = None, neighbours: int = 100, recent: int = 1000
) -> Scorer:
    """Builds VSKNN (Ludewig and Jannach, UMUAI 2018): as SKNN, but shared items have weights, from 1 for the last item of the prefix
    linearly down to the first; similarity is the sum of these weights, and a neighbour's items get it divided by the steps back to the last
    shared item, as in the authors' code."""
    sessions = TrainingSessions(rows, offsets, items, recent)

    def evidence(prefixes: np.ndarray) -> Entries:
        case, row, place = latest(prefixes, items)
        length = (prefixes != PAD).sum(1)
        shared = sessions.sharing(len(prefixes), case, row, place / length[case])
        steps = 1 + sessions.steps_back(len(prefixes), case, row, length[case] - place)[shared.entry]
        best = shared.nearest(shared.weight, neighbours)
        return entries_of(shared.matrix(best, shared.weight / steps, len(prefixes), sessions) @ sessions.items_of)

    return Scorer(popular_share(rows, items), evidence)


class SharedSessions(NamedTuple):
    """Holds the training sessions that share an item with a prefix, and are recent enough."""

    case: np.ndarray  # (P,) index of the prefix, ascending
    session: np.ndarray  # (P,) ascending within a case
    weight: np.ndarray  # (P,) sum of the weights of the shared items
    entry: np.ndarray  # (P,) place among all sessions that share an item, in the same order

    def nearest(self, similarity: np.ndarray, neighbours: int) -> np.ndarray:
        """Returns the places of the `neighbours` most similar sessions of each case; of equally similar ones the more recent are taken."""
        order = np.lexsort((-self.session, -similarity, self.case))
        begin = np.searchsorted(self.case, self.case)
        best: np.ndarray = order[np.arange(len(order)) - begin < neighbours]
        return best

    def matrix(self, chosen: np.ndarray, value: np.ndarray, cases: int, sessions: "TrainingSessions") -> csr_array:
        """Returns the `value` (P,) of the `chosen` sessions as a matrix (cases, S)."""
        return csr_array((value[chosen], (self.case[chosen], self.session[chosen])), shape=(cases, sessions.count))


class TrainingSessions:
    """Holds the distinct items of each training session, and the last `recent` sessions of each item; session numbers rise with time."""

    def __init__(self, rows: np.ndarray, offsets: np.ndarray, items: int, recent: int) -> None:
        self.count, self.items, self.recent = len(offsets) - 1, items, recent
        session = np.repeat(np.arange(self.count, dtype=np.int64), np.diff(offsets))
        place = np.arange(len(rows)) - offsets[session] + 1
        key, last = np.unique((session * items + rows)[::-1], return_index=True)  # of several positions of an item, the last one
        self.session, self.row, self.place = key // items, key % items, place[::-1][last]  # (K,) the distinct items of all sessions
        self.length = np.diff(offsets)  # (S,) events
        self.size = np.bincount(self.session, minlength=self.count)  # (S,) distinct items
        self.first = np.searchsorted(self.session, np.arange(self.count + 1))
        self.items_of = csr_array((np.ones(len(key)), self.row, self.first), shape=(self.count, items))
        # an item's sessions before its last `recent` ones are not among the last `recent` of any prefix that has it
        by_row = np.argsort(self.row, kind="stable")
        begin = np.searchsorted(self.row[by_row], np.arange(items + 1))
        kept = by_row[begin[self.row[by_row] + 1] - np.arange(len(key)) <= recent]
        self.kept, indptr = kept, np.searchsorted(self.row[kept], np.arange(items + 1))
        self.holders = csr_array((np.ones(len(kept)), self.session[kept], indptr), shape=(items, self.count))

    def shared(self, cases: int, case: np.ndarray, row: np.ndarray, weight: np.ndarray, holders: csr_array | None = None) -> csr_array:
        """Returns (cases, S): for each prefix and session the sum of `weight` (E,), above 0, over the shared items. `case` and `row` (E,)
        are the distinct items of the prefixes; `holders` (N, S) weighs the items of the sessions."""
        found = csr_array((weight, (case, row)), shape=(cases, self.items)) @ (self.holders if holders is None else holders)
        found.sort_indices()
        return found

    def sharing(self, cases: int, case: np.ndarray, row: np.ndarray, weight: np.ndarray) -> SharedSessions:
        """Finds for each prefix the last `recent` sessions that share an item with it; parameters as in `shared`."""
        found = self.shared(cases, case, row, weight)
        case = np.repeat(np.arange(cases), np.diff(found.indptr))
        entry = np.flatnonzero(found.indptr[case + 1] - np.arange(len(case)) <= self.recent)
        return SharedSessions(case[entry], found.indices[entry], found.data[entry], entry)

    def steps_back(self, cases: int, case: np.ndarray, row: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Returns the smallest of the `steps` (E,), distances from the end of the prefix, over the items that a session shares: one number
        for each of the sessions in `shared`, in its order."""
        return smallest(self.shared(cases, case, row, power(steps)))

    @cached_property
    def places(self) -> csr_array:
        """(N, S) the `power` of the distance of each item from the end of each session that has it."""
        back = power(self.length[self.session[self.kept]] - self.place[self.kept])
        return csr_array((back, self.holders.indices, self.holders.indptr), shape=self.holders.shape)

    def place_in_session(self, cases: int, case: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Returns the distance of the last shared item from the end of the session: one number for each of the sessions in `shared`."""
        return smallest(self.shared(cases, case, row, np.ones(len(case)), self.places))


def power(steps: np.ndarray) -> np.ndarray:
    """Returns 4 ** -steps. A sum of distinct such numbers is less than four thirds of the greatest, which thus can be told from the sum:
    so a matrix product, which only adds, finds the smallest step."""
    powers: np.ndarray = np.exp2(-2.0 * np.minimum(steps, FAR))
    return powers


def smallest(sums: csr_array) -> np.ndarray:
    """Returns for each entry of a matrix of sums of `power` the smallest step in it."""
    exponent = np.frexp(sums.data)[1] - 1  # floor(log2)
    steps: np.ndarray = -(exponent // 2)
    return steps


def similar_by_cosine(sessions: TrainingSessions, prefixes: np.ndarray, neighbours: int) -> csr_array:
    """Returns (B, S) the cosine of the item sets of each prefix and its nearest sessions."""
    case, row, _ = latest(prefixes, sessions.items)
    shared = sessions.sharing(len(prefixes), case, row, np.ones(len(case)))
    size = np.bincount(case, minlength=len(prefixes))
    similarity = shared.weight / np.sqrt(size[shared.case] * sessions.size[shared.session])
    return shared.matrix(shared.nearest(similarity, neighbours), similarity, len(prefixes), sessions)


def entries_of(scores: csr_array) -> Entries:
    """Returns the entries of a matrix of scores (B, N)."""
    scores.sum_duplicates()  # and sorts them
    case = np.repeat(np.arange(scores.shape[0]), np.diff(scores.indptr))
    return Entries(case, scores.indices.astype(np.int64), scores.data.astype(np.float32))
