"""Groups sequences into batches by a token budget."""

import numpy as np

NEAR = 0.95  # a batch ends where the next sequence is shorter than this share of its longest one ...
FILLED = 1 / 16  # ... if it is filled to this share: padding is cheaper than many small batches


def cut(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Returns the positions of sequences in batches, longest first: of at most `token_budget` padded tokens, or of one sequence."""
    batches: list[list[int]] = []
    full = True
    for position in np.argsort(-lengths, kind="stable").tolist():
        if not full:
            longest, size = lengths[batches[-1][0]], len(batches[-1])
            far = lengths[position] < NEAR * longest and size * longest >= FILLED * token_budget
            full = far or (size + 1) * longest > token_budget
        if full:
            batches.append([])
        batches[-1].append(position)
        full = False
    return [np.array(batch) for batch in batches]
