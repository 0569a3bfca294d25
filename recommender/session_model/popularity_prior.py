"""How often an item comes, as far as its content tells: what a new item, and one seen a few times, is expected to do."""

import numpy as np

STRENGTHS = 10.0 ** np.arange(-3, 3.5, 0.5)  # of the ridge, for each item it is fitted on


def expected_log_counts(content: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of the logs of those counts (N,) that are not zero, relative to their mean, on the content (N, D), whose mean
    over these items is zero: its weights (D,), and what it expects of each item (N,), of one with a count without that count.

    Both follow from one fit, leaving one item out being a division by one less its leverage; the ridge is the one that so expects
    best (PRESS: Allen, Technometrics 16, 1974). Where content tells nothing of counts, it expects the same of all.
    """
    known = counts > 0
    fitted, wanted = content[known].astype(np.float64), np.log(counts[known], dtype=np.float64)
    wanted -= wanted.mean()
    variances, axes = np.linalg.eigh(fitted.T @ fitted)
    turned = fitted @ axes
    squares = np.square(turned, out=fitted)  # in its place: of a million items a gigabyte
    found = []
    for ridge in STRENGTHS * len(fitted):
        weights = turned.T @ wanted / (variances + ridge)
        leverage = squares @ (1 / (variances + ridge))
        others = wanted - (wanted - turned @ weights) / (1 - leverage)
        found.append((float(np.square(wanted - others).sum()), weights, others))
    _, weights, others = min(found, key=lambda of: of[0])
    expects = (axes @ weights).astype(np.float32)
    expected = content @ expects
    expected[known] = others
    return expects, expected.astype(np.float32)
