"""The exported vectors as the session model reads them: centred, turned to their main directions, each of these of variance 1."""

from typing import NamedTuple

import numpy as np


class Whitening(NamedTuple):
    mean: np.ndarray  # (D,)
    axes: np.ndarray  # (D, K)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(N, D) -> (N, K) float32"""
        return np.asarray((vectors - self.mean) @ self.axes, np.float32)


def fit_whitening(vectors: np.ndarray, fitted_on: np.ndarray, components: int | None = None, whiten: bool = True) -> Whitening:
    """PCA-whitening of (N, D) to the first K directions, at most `components` (None: all D), with mean and covariance of the rows
    `fitted_on` (N,) bool only; directions that carry next to nothing there are left small and not blown up. Without `whiten`: centred,
    and scaled as a whole."""
    mean = vectors[fitted_on].mean(0, dtype=np.float64)
    values, axes = np.linalg.eigh(np.atleast_2d(np.cov((vectors - mean)[fitted_on], rowvar=False)))
    values = np.maximum(values, 0)
    least = max(values.mean(), 1e-12)
    scales = np.sqrt(values + 0.01 * least) if whiten else np.full(len(values), np.sqrt(least))
    kept = (axes / scales)[:, -min(components or len(values), len(values)) :]
    return Whitening(mean, np.ascontiguousarray(kept))  # as safetensors writes an array, whatever its strides
