"""Measures which items stand near each other in the training sessions: PPMI, and its main directions as vectors of items."""

import numpy as np
from scipy.sparse import csr_array

from recommender.session_model.pair_counts import pair_keys

WINDOW, SMOOTHING, LEAST_SESSIONS = 3, 0.75, 2  # of the directions
OVERSAMPLING, ITERATIONS = 10, 4  # of the randomised SVD


def ppmi(rows: np.ndarray, offsets: np.ndarray, items: int, window: int, smoothing: float, damping: float) -> csr_array:
    """Computes the positive pointwise mutual information (N, N) of pairs of items, those above zero: how much more often they stand near
    each other than by chance,

        PPMI(i, j) = max(0, log(c(i, j) * sum_k c(k)^a / (c(i) * c(j)^a))),

    with pairs up to `window` steps apart counted as 1 / steps, in either order, and contexts smoothed by the power a, `smoothing` (Levy et
    al., TACL 3, 2015). As chance pairs of rare items have the greatest values, each is multiplied by c(i, j) / (c(i, j) + `damping`) (after
    Pantel and Lin, KDD 2002). An item is not near itself.
    """
    return ppmi_of(near_pairs(rows, offsets, items, window), smoothing, damping)


def ppmi_of(pairs: csr_array, smoothing: float, damping: float) -> csr_array:
    """Computes the PPMI (N, N) of counts of pairs (N, N), which are symmetric; parameters as in `ppmi`."""
    pairs = pairs.tocoo()
    (first, second), items = pairs.coords, pairs.shape[0]
    count = np.bincount(first, pairs.data, items)
    context = count**smoothing
    value = np.log(pairs.data * context.sum() / (count[first] * context[second]))
    value *= pairs.data / (pairs.data + damping)
    positive = (value > 0) & (first != second)
    return csr_array((value[positive], (first[positive], second[positive])), shape=(items, items))


def directions(rows: np.ndarray, offsets: np.ndarray, items: int, dim: int) -> np.ndarray:
    """Computes vectors (N, dim) float32 of length one whose products approximate the PPMI of the items: U sqrt(S) of a truncated SVD, each
    scaled to length one (Levy et al., TACL 3, 2015). An item without pairs has zeros.

    Only pairs that `LEAST_SESSIONS` sessions have count: a pair of one session would be its own evidence when the model trains on that
    session, which then trusts the vectors too much. The SVD is a randomised one (Halko, Martinsson and Tropp, SIAM Review 53, 2011), of a
    few products with the sparse matrix: the same sessions give the same vectors.
    """
    pairs = near_pairs(rows, offsets, items, WINDOW).multiply(common_pairs(rows, offsets, items)).tocsr()
    matrix = ppmi_of(pairs, SMOOTHING, 0.0).astype(np.float32)
    kept = min(dim, items)
    basis = np.random.default_rng(0).standard_normal((items, min(dim + OVERSAMPLING, items)), np.float32)
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    projected = matrix.T @ basis
    squares, left = np.linalg.eigh((projected.T @ projected).astype(np.float64))  # of a small matrix: its SVD would be one of N lines
    strengths, left = np.sqrt(np.maximum(squares[::-1], 0)), left[:, ::-1].astype(np.float32)
    vectors = np.zeros((items, dim), np.float32)
    vectors[:, :kept] = (basis @ left[:, :kept]) * np.sqrt(strengths[:kept])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    paired = (lengths > 1e-6) & (np.diff(matrix.indptr)[:, None] > 0)
    units: np.ndarray = np.where(paired, vectors / np.maximum(lengths, 1e-6), np.float32(0))
    return units


def near_pairs(rows: np.ndarray, offsets: np.ndarray, items: int, window: int) -> csr_array:
    """Counts pairs of items up to `window` steps apart in a session, each as 1 / steps, in either order: (N, N)."""
    keys = [pair_keys(rows, offsets, items, step) for step in range(1, window + 1)]
    key, times = np.concatenate(keys), np.repeat(1 / np.arange(1, window + 1), [len(of_step) for of_step in keys])
    one_way = csr_array((times, (key // items, key % items)), shape=(items, items))
    return (one_way + one_way.T).tocsr()


def common_pairs(rows: np.ndarray, offsets: np.ndarray, items: int) -> csr_array:
    """Returns (N, N) 1 for the pairs of items that stand up to `WINDOW` steps apart in `LEAST_SESSIONS` sessions or more."""
    session, keys, sessions = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)), [], []
    for step in range(1, WINDOW + 1):
        inside = session[step:] == session[:-step]
        first, second = rows[:-step][inside].astype(np.int64), rows[step:][inside]
        keys.append(np.minimum(first, second) * items + np.maximum(first, second))
        sessions.append(session[step:][inside])
    key, of_session = np.concatenate(keys), np.concatenate(sessions)
    order = np.lexsort((of_session, key))
    key, of_session = key[order], of_session[order]
    once = np.flatnonzero((np.diff(key, prepend=-1) != 0) | (np.diff(of_session, prepend=-1) != 0))  # each pair once a session
    pair, times = np.unique(key[once], return_counts=True)
    pair = pair[times >= LEAST_SESSIONS]
    half = csr_array((np.ones(len(pair)), (pair // items, pair % items)), shape=(items, items))
    return (half + half.T).sign().tocsr()
