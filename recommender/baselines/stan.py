"""Scores items by the nearest training sessions with decays of position and time: STAN and VSTAN.

STAN (Garg et al., Sequence and Time Aware Neighborhood for Session-based Recommendations, SIGIR 2019) has three decays: an item of the
prefix weighs exp(-steps back / `position_decay`) in the cosine, a session loses exp(-age / `session_decay`), and an item of a neighbour
exp(-steps from the last shared item / `item_decay`). VSTAN (Ludewig et al., UMUAI 31, 2021) adds two ideas of VSKNN: a neighbour weighs
exp(-steps back of its last shared item in the prefix / `shared_decay`), and an item 1 + `idf` * log(sessions / its events).

The age of a session is counted from the end of the training, as a share of its length, so that one setting fits logs of a day and of
years: the time from there to the prefix would scale all scores of the prefix alike.
"""

from functools import partial

import numpy as np
from scipy.sparse import csr_array

from recommender.baselines.counts import Entries, Scorer, above_popularity, expand, latest, popular_share
from recommender.baselines.nearest_sessions import TrainingSessions, entries_of
from recommender.session_model.windows import PAD


def vector_stan(
    rows: np.ndarray,
    offsets: np.ndarray,
    items: int,
    starts: np.ndarray | None = None,
    neighbours: int = 500,
    recent: int = 2500,
    position_decay: float = 4.0,
    session_decay: float = 0.3,
    item_decay: float = 4.0,
    shared_decay: float | None = 4.0,
    idf: float = 1.0,
) -> Scorer:
    """Builds VSTAN. `starts` (S,) are the sessions' times, None: all alike. `shared_decay` None: every neighbour weighs alike."""
    sessions = TrainingSessions(rows, offsets, items, recent)
    log_decay = np.zeros(sessions.count)  # of each session by its age
    if starts is not None and sessions.count:
        log_decay = (starts - starts.max()) / (max(float(starts.max() - starts.min()), 1.0) * session_decay)
    counts = np.bincount(rows, minlength=items)
    rarity = 1 + idf * np.log(np.maximum(sessions.count / np.maximum(counts, 1), 1))

    def evidence(prefixes: np.ndarray) -> Entries:
        case, row, place = latest(prefixes, items)
        steps = (prefixes != PAD).sum(1)[case] - place
        weight = np.exp(-steps / position_decay)
        shared = sessions.sharing(len(prefixes), case, row, weight)
        norm = np.bincount(case, weight**2, len(prefixes))
        log_similarity = np.log(shared.weight / np.sqrt(norm[shared.case] * sessions.size[shared.session])) + log_decay[shared.session]
        best = shared.nearest(log_similarity, neighbours)
        which, of_case, entry = shared.session[best], shared.case[best], shared.entry[best]
        log_value = log_similarity[best]
        if shared_decay is not None:
            log_value = log_value - sessions.steps_back(len(prefixes), case, row, steps)[entry] / shared_decay
        last_shared = sessions.length[which] - sessions.place_in_session(len(prefixes), case, row)[entry]
        greatest = np.full(len(prefixes), -np.inf)
        np.maximum.at(greatest, of_case, log_value)
        value = np.exp(log_value - greatest[of_case])  # relative to the greatest: an old session's own value underflows
        line, item = expand(sessions.first[which], sessions.first[which + 1])
        score = value[line] * np.exp(-np.abs(sessions.place[item] - last_shared[line]) / item_decay) * rarity[sessions.row[item]]
        return above_popularity(entries_of(csr_array((score, (of_case[line], sessions.row[item])), shape=(len(prefixes), items))))

    return Scorer(popular_share(rows, items) / 1000, evidence)


stan = partial(vector_stan, shared_decay=None, idf=0.0)
