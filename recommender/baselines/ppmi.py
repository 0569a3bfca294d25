"""Scores items by the positive pointwise mutual information of pairs of items: item-kNN by PPMI.

The score of an item is the sum of its similarities to the items of the prefix, which weigh `decay` per step back; the similarity is
`co_occurrence.ppmi`.
"""

import numpy as np
from scipy.sparse import csr_array

from recommender.baselines.counts import Entries, Scorer, above_popularity, latest, popular_share
from recommender.baselines.nearest_sessions import entries_of
from recommender.session_model.co_occurrence import ppmi
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
