"""Holds the test cases of an evaluation, and the results of a model on them."""

from typing import NamedTuple

import numpy as np

from recommender.metrics.evaluator import buckets_of, duplicates, facts_of, positions_of
from recommender.session_model.windows import PAD, Windows, prefixes_of
from recommender.training.dataset import TrainingData

CONTROL_CASES = 20_000  # maximum number of cases that are ranked again with shuffled prefixes


class SeedResult(NamedTuple):
    """The test results of one model with one seed."""

    ranks: np.ndarray  # (cases,)
    shuffled: np.ndarray  # (2, control cases) ranks with shuffled prefixes
    recommended: np.ndarray  # (N,) number of cases in which an item is among the first 20
    seconds: np.ndarray  # (2,) of the training, and of ranking the test with the first 20 items of each case


class EvaluationCases:
    """Holds the test cases, their buckets, and the cases that are ranked again with shuffled prefixes."""

    def __init__(self, inputs: TrainingData, max_prefix: int) -> None:
        self.windows = inputs.windows(max_prefix)[2]
        self.log, self.available = inputs.split.test, inputs.available
        self.session, self.position = positions_of(self.windows, self.log)
        trained, group = duplicates(self.log, inputs.split.train)
        self.cluster = group[self.session]  # (cases,) number of the session; sessions with the same items share one
        distinct = ~trained & (group == np.arange(len(group)))
        self.buckets = buckets_of(self.windows, inputs.counts) | {"distinct": distinct[self.session]}
        self.control, self.orders = shuffled_prefixes(self.windows)
        self.facts = facts_of(inputs.split, inputs.counts, trained, group) | {
            "test_cases": len(self.session),
            "distinct_test_sessions": int(distinct.sum()),
            "unseen_targets": int(self.buckets["cold"].sum()),
            "test_sessions_older_than_newest_training": int((self.log.start < inputs.split.train.start.max()).sum()),
            "split_by_user": bool(self.log.users),
        }


def shuffled_prefixes(windows: Windows) -> tuple[np.ndarray, list[Windows]]:
    """Returns the cases (C,) with a prefix of three items or more, which both shuffles can change, and these cases with shuffled prefixes.

    The first shuffle is of all items of a prefix, the second of all but the last. At most `CONTROL_CASES` cases, a fixed random sample,
    are taken; they are sorted by length, so that little is padded."""
    prefixes, targets = prefixes_of(windows)
    length = (prefixes != PAD).sum(1)
    rng = np.random.default_rng(0)
    chosen = np.flatnonzero(length >= 3)
    if len(chosen) > CONTROL_CASES:
        chosen = np.sort(rng.choice(chosen, CONTROL_CASES, replace=False))
    chosen = chosen[np.argsort(length[chosen], kind="stable")]
    times = None if windows.times is None else windows.times[windows.targets != PAD][chosen, None]
    prefixes, length, line = prefixes[chosen], length[chosen], np.arange(len(chosen))
    only_last = np.full_like(prefixes, PAD)
    only_last[line, length - 1] = targets[chosen]
    place, orders = np.arange(prefixes.shape[1]), []
    for fixed in (0, 1):  # number of last items that are not shuffled
        key = np.where(place < (length - fixed)[:, None], rng.random(prefixes.shape), 1 + place)
        target_times = None if times is None else np.broadcast_to(times, prefixes.shape)
        orders.append(Windows(np.take_along_axis(prefixes, key.argsort(1), 1), only_last, line, target_times))
    return chosen, orders
