"""Predicts the log training count of an item from its content: the popularity prior of cold items and of items seen a few times."""

import numpy as np

STRENGTHS = 10.0 ** np.arange(-3, 3.5, 0.5)  # ridge penalties to choose from, per fitted item


def fit_popularity_prior(content: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits a ridge regression of log counts on the content vectors: weights (D,), and the predicted log count of every item (N,).

    It is fitted on the items with a count above zero; `counts` (N,), whose logs are taken relative to their mean, and `content` (N, D),
    whose mean over these items is zero. The prediction for an item with a count leaves that item out, which takes no second fit: the
    residual is divided by one minus the item's leverage. The penalty is the one with the least squared leave-one-out error
    (PRESS: Allen, Technometrics 16, 1974). If content does not correlate with counts, all predictions are alike.
    """
    known = counts > 0
    fitted, log_counts = content[known].astype(np.float64), np.log(counts[known], dtype=np.float64)
    log_counts -= log_counts.mean()
    variances, axes = np.linalg.eigh(fitted.T @ fitted)
    rotated = fitted @ axes
    squares = np.square(rotated, out=fitted)  # in place: a copy takes a gigabyte for a million items
    fits = []
    for ridge in STRENGTHS * len(fitted):
        weights = rotated.T @ log_counts / (variances + ridge)
        leverage = squares @ (1 / (variances + ridge))
        left_out = log_counts - (log_counts - rotated @ weights) / (1 - leverage)
        fits.append((float(np.square(log_counts - left_out).sum()), weights, left_out))
    _, weights, left_out = min(fits, key=lambda fit: fit[0])
    projection = (axes @ weights).astype(np.float32)
    predicted = content @ projection
    predicted[known] = left_out
    return projection, predicted.astype(np.float32)
