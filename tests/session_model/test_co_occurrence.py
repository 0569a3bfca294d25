"""The main directions of co-occurrence against an exact decomposition, and where id vectors start."""

import numpy as np
import torch

from recommender.session_model.co_occurrence import SMOOTHING, WINDOW, common_pairs, directions, ppmi
from recommender.session_model.config import ModelConfig, Parts
from recommender.session_model.model import SessionModel

ITEMS, WITHOUT = 40, 3  # the last items are in no session


def sessions() -> tuple[np.ndarray, np.ndarray]:
    """Sessions within one of four groups of items each."""
    rng = np.random.default_rng(0)
    rows = [4 * rng.integers(0, (ITEMS - WITHOUT) // 4, size=6) + group for group in rng.integers(0, 4, size=300)]
    return np.concatenate(rows).astype(np.int32), np.arange(301) * 6


def test_the_directions_are_those_of_an_exact_decomposition() -> None:
    rows, offsets = sessions()
    left, strengths, _ = np.linalg.svd(ppmi(rows, offsets, ITEMS, WINDOW, SMOOTHING, 0.0).toarray())  # every pair is in many sessions
    for dim in (4, 16, ITEMS):
        exact = left[:, :dim] * np.sqrt(strengths[:dim])
        exact = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-9)
        vectors = directions(rows, offsets, ITEMS, dim)
        in_sessions = slice(0, ITEMS - WITHOUT - 1)
        assert np.abs(vectors @ vectors.T - exact @ exact.T)[in_sessions, in_sessions].max() < 0.02
        assert not vectors[ITEMS - WITHOUT :].any()
    assert directions(rows, offsets, ITEMS, 64).shape == (ITEMS, 64)  # more numbers than items


def test_a_pair_of_one_session_is_no_evidence() -> None:
    """Not even where it comes twice in that session; in another order in another session it counts."""
    rows, offsets = np.array([0, 1, 0, 1, 2, 3, 4, 4, 2], np.int32), np.array([0, 4, 7, 9])
    assert [tuple(pair) for pair in np.argwhere(common_pairs(rows, offsets, 5).toarray())] == [(2, 4), (4, 2)]
    assert directions(rows, offsets, 5, 3).any(1).tolist() == [False, False, True, False, True]


def test_items_of_one_group_have_near_directions() -> None:
    vectors = directions(*sessions(), ITEMS, 8)[:36]
    near = vectors @ vectors.T
    same = np.arange(36)[:, None] % 4 == np.arange(36) % 4
    assert near[same].min() > near[~same].max()


def test_id_vectors_start_from_the_directions_and_others_at_random() -> None:
    rows, offsets = sessions()
    start = directions(rows, offsets, ITEMS, 16)
    torch.manual_seed(0)
    content, paired = np.random.default_rng(0).normal(size=(ITEMS, 4)), start.any(1)
    for model in (SessionModel(ModelConfig(ITEMS, dim, True, 16), content if dim else None, rows, offsets) for dim in (0, 4)):
        weights = model.ids.weight.detach().numpy()
        assert np.allclose(weights[paired], 1.2 * start[paired], atol=1e-6)
        assert (np.linalg.norm(weights[~paired], axis=1) > 0.05).all()
    torch.manual_seed(0)
    random = SessionModel(ModelConfig(ITEMS, 0, True, 16, parts=Parts(directions=False)), None, rows, offsets)
    assert not np.allclose(random.ids.weight.detach().numpy()[paired], weights[paired])
