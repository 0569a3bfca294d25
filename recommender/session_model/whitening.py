"""Whitens the exported vectors for the session model: centred, rotated to their principal axes, each axis scaled to variance 1."""

from typing import NamedTuple

import numpy as np


class Whitening(NamedTuple):
    mean: np.ndarray  # (D,)
    axes: np.ndarray  # (D, K)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Whitens vectors: (N, D) -> (N, K) float32."""
        return np.asarray((vectors - self.mean) @ self.axes, np.float32)


def fit_whitening(vectors: np.ndarray, fitted_on: np.ndarray, components: int | None = None, whiten: bool = True) -> Whitening:
    """Fits a PCA-whitening of vectors (N, D) to their first K principal axes, at most `components` (None: all D).

    Mean and covariance are those of the rows `fitted_on` (N,) bool. A hundredth of the mean variance is added to every axis, so that
    axes with hardly any variance stay small instead of being scaled up to noise. Without `whiten` the vectors are centred and scaled by
    one common factor.
    """
    mean = vectors[fitted_on].mean(0, dtype=np.float64)
    values, axes = np.linalg.eigh(np.atleast_2d(np.cov((vectors - mean)[fitted_on], rowvar=False)))
    values = np.maximum(values, 0)
    mean_variance = max(values.mean(), 1e-12)
    scales = np.sqrt(values + 0.01 * mean_variance) if whiten else np.full(len(values), np.sqrt(mean_variance))
    scaled = (axes / scales)[:, -min(components or len(values), len(values)) :]
    return Whitening(mean, np.ascontiguousarray(scaled))  # safetensors writes an array's memory, whatever its strides
