"""Scores items by the positive pointwise mutual information of pairs of items: item-kNN by PPMI.

The similarity of two items is how much more often they stand near each other in a session than by chance,

    PPMI(i, j) = max(0, log(c(i, j) * sum_k c(k)^a / (c(i) * c(j)^a))),

with pairs up to `window` steps apart counted as 1 / steps, in either order, and contexts smoothed by the power a (Levy et al., TACL 3,
2015). As chance pairs of rare items have the greatest values, each is multiplied by c(i, j) / (c(i, j) + `damping`) (after Pantel and Lin,
KDD 2002). The score of an item is the sum of its similarities to the items of the prefix, which weigh `decay` per step back.
"""

import numpy as np
from scipy.sparse import csr_array

from recommender.baselines.counts import Entries, Scorer, above_popularity, latest, popular_share
from recommender.baselines.nearest_sessions import entries_of
from recommender.session_model.pair_counts import pair_keys
from recommender.session_model.windows import PAD


def ppmi_knn(
    rows: np.ndarray,
    offsets: np.ndarray,
    items: int,
    starts: np.ndarray | None = None,
    window: int = 3,
    smoothing: float = 0.75,
    damping: float = 5.0,
    decay: float = 0.5,
) -> Scorer:
    """Builds item-kNN by PPMI."""
    similarity = ppmi(rows, offsets, items, window, smoothing, damping)

    def evidence(prefixes: np.ndarray) -> Entries:
        case, row, place = latest(prefixes, items)
        weight = decay ** ((prefixes != PAD).sum(1)[case] - place)
        return above_popularity(entries_of(csr_array((weight, (case, row)), shape=(len(prefixes), items)) @ similarity))

    return Scorer(popular_share(rows, items) / 1000, evidence)


def ppmi(rows: np.ndarray, offsets: np.ndarray, items: int, window: int, smoothing: float, damping: float) -> csr_array:
    """Computes the damped PPMI (N, N) of the pairs that are above zero. An item is no neighbour of itself."""
    keys = [pair_keys(rows, offsets, items, step) for step in range(1, window + 1)]
    key, times = np.concatenate(keys), np.repeat(1 / np.arange(1, window + 1), [len(of_step) for of_step in keys])
    one_way = csr_array((times, (key // items, key % items)), shape=(items, items))
    pairs = (one_way + one_way.T).tocoo()
    first, second = pairs.coords
    count = np.bincount(first, pairs.data, items)
    context = count**smoothing
    value = np.log(pairs.data * context.sum() / (count[first] * context[second]))
    value *= pairs.data / (pairs.data + damping)
    positive = (value > 0) & (first != second)
    return csr_array((value[positive], (first[positive], second[positive])), shape=(items, items))
