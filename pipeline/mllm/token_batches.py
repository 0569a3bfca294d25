"""Groups sequences into batches by a token budget."""

import numpy as np

NEAR = 0.95  # a batch ends where the next sequence is shorter than this share of its longest one ...
FILLED = 1 / 16  # ... if it is filled to this share: small leftovers are better computed than launched one by one


def cut(lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Positions of sequences in batches, longest first, of at most `token_budget` tokens with their padding, or of one sequence."""
    batches: list[list[int]] = []
    full = True
    for at in np.argsort(-lengths, kind="stable").tolist():
        if not full:
            longest, size = lengths[batches[-1][0]], len(batches[-1])
            far = lengths[at] < NEAR * longest and size * longest >= FILLED * token_budget
            full = far or (size + 1) * longest > token_budget
        if full:
            batches.append([])
        batches[-1].append(at)
        full = False
    return [np.array(batch) for batch in batches]
