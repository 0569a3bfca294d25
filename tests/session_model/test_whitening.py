"""Whitening of the exported vectors: which items it is fitted on, and which axes it keeps."""

import numpy as np

from recommender.session_model.whitening import fit_whitening


def test_whitening_is_fitted_on_training_items_alone() -> None:
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(300, 8)) @ (np.eye(8) + 0.3 * rng.normal(size=(8, 8))) + 3).astype(np.float32)
    fitted = np.arange(300) < 200
    white = fit_whitening(vectors, fitted)(vectors)
    assert np.allclose(white[fitted].mean(0), 0, atol=1e-4)
    assert np.allclose(np.cov(white[fitted], rowvar=False), np.eye(8), atol=0.25)
    moved = vectors.copy()
    moved[~fitted] += 100
    assert np.allclose(fit_whitening(moved, fitted)(moved)[fitted], white[fitted])


def test_the_principal_axes_are_kept() -> None:
    """Three directions among forty with a little noise: three components span them, up to a rotation."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(300, 3))
    vectors = (true @ rng.normal(size=(3, 40)) + 0.05 * rng.normal(size=(300, 40))).astype(np.float32)
    whitened = fit_whitening(vectors, np.ones(300, bool), components=3)(vectors)
    assert whitened.shape == (300, 3)
    recovered = whitened @ np.linalg.lstsq(whitened, true, rcond=None)[0]
    assert np.corrcoef(recovered.ravel(), true.ravel())[0, 1] > 0.99
    assert fit_whitening(vectors, np.ones(300, bool), components=64)(vectors).shape == (300, 40)
