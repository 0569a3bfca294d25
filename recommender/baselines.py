"""What a session model has to beat: popularity, repeating the last item, co-occurrence, and nearest sessions.

Each scores a batch of prefixes (B, L), padded with -1 on the right, as (B, N), from the training sessions alone.
Counts of training popularity, far below any other evidence, break ties, so no list ends in catalogue order.
"""

from collections.abc import Callable

import numpy as np

from recommender.sessions import PAD

Scorer = Callable[[np.ndarray], np.ndarray]


def popularity(rows: np.ndarray, items: int) -> Scorer:
    """Training events per item, whatever the session."""
    counts = np.bincount(rows, minlength=items).astype(np.float32)
    return lambda prefixes: np.tile(counts, (len(prefixes), 1))


def last_item_repeat(rows: np.ndarray, items: int) -> Scorer:
    """The items of the prefix, latest first, then the popular ones."""
    base = popular_share(rows, items)

    def score(prefixes: np.ndarray) -> np.ndarray:
        scores = np.tile(base, (len(prefixes), 1))
        for place in range(prefixes.shape[1]):  # later places overwrite earlier ones
            real = np.flatnonzero(prefixes[:, place] != PAD)
            scores[real, prefixes[real, place]] = 1 + place
        return scores

    return score


def co_occurrence(rows: np.ndarray, offsets: np.ndarray, items: int) -> Scorer:
    """How often each item directly followed the prefix's last one."""
    base = popular_share(rows, items)
    inside = np.ones(max(len(rows) - 1, 0), bool)
    inside[offsets[1:-1] - 1] = False  # pairs that straddle two sessions
    source, follower, count = count_pairs(rows[:-1][inside], rows[1:][inside], items)
    begin = np.searchsorted(source, np.arange(items + 1))

    def score(prefixes: np.ndarray) -> np.ndarray:
        scores = np.tile(base, (len(prefixes), 1))
        length = (prefixes != PAD).sum(1)
        case = np.flatnonzero(length)
        last = prefixes[case, length[case] - 1]
        line, entry = expand(begin[last], begin[last + 1])
        scores[case[line], follower[entry]] += count[entry]
        return scores

    return score


def session_knn(rows: np.ndarray, offsets: np.ndarray, items: int, neighbours: int = 100, recent: int = 1000) -> Scorer:
    """SKNN: the items of the `neighbours` training sessions most alike (cosine of item sets) among the `recent` ones
    that share an item, weighted by that likeness."""
    base = popular_share(rows, items)
    session, row = np.unique(np.stack([np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), rows]), axis=1)
    size = np.bincount(session, minlength=len(offsets) - 1)
    first = np.searchsorted(session, np.arange(len(offsets)))  # items of a session: row[first[s]:first[s + 1]]
    by_row = np.lexsort((session, row))
    holder, begin = session[by_row], np.searchsorted(row[by_row], np.arange(items + 1))  # sessions of an item, oldest first

    def one(prefix: np.ndarray) -> np.ndarray:
        scores = base.copy()
        seen = np.unique(prefix[prefix != PAD])
        if not len(seen):
            return scores
        found, overlap = np.unique(np.concatenate([holder[begin[i] : begin[i + 1]] for i in seen]), return_counts=True)
        found, overlap = found[-recent:], overlap[-recent:]  # numbers rise with time
        likeness = overlap / np.sqrt(len(seen) * size[found])
        best = np.argsort(-likeness, kind="stable")[:neighbours]
        line, entry = expand(first[found[best]], first[found[best] + 1])
        scores += np.bincount(row[entry], weights=likeness[best][line], minlength=items).astype(np.float32)
        return scores

    return lambda prefixes: np.stack([one(prefix) for prefix in prefixes])


def popular_share(rows: np.ndarray, items: int) -> np.ndarray:
    """(N,) popularity scaled to stay below any count or likeness."""
    counts = np.bincount(rows, minlength=items).astype(np.float32)
    return counts / (1000 * max(float(counts.max(initial=0)), 1.0))


def count_pairs(first: np.ndarray, second: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct pairs in order of their first item, and how often each occurs."""
    key, count = np.unique(first.astype(np.int64) * items + second, return_counts=True)
    return key // items, key % items, count.astype(np.float32)


def expand(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges start[i]:stop[i] written out: (which range, which entry), one element each."""
    length = stop - start
    line = np.repeat(np.arange(len(start)), length)
    return line, np.arange(len(line)) - np.repeat(np.cumsum(length) - length, length) + start[line]
