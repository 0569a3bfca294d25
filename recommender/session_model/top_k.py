"""The greatest of many scores, in numpy: whoever answers a single session needs no PyTorch."""

import numpy as np


def first(scores: np.ndarray, k: int) -> np.ndarray:
    """Places of the k greatest of (C,), the greatest first; of equal ones the first."""
    some = np.flatnonzero(scores >= np.partition(scores, -k)[-k]) if k < len(scores) else np.arange(len(scores))
    found: np.ndarray = some[np.lexsort((some, -scores[some]))][:k]
    return found
