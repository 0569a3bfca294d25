"""Calibration on validation sessions: the weights of repeats and of cold items move to where validation ranks best."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

from helpers.session_models import COLD, ITEMS, random_model
from recommender.metrics.evaluator import model_ranks
from recommender.session_model.windows import PAD, Windows, pack
from recommender.training.calibration import calibrate


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_the_weight_of_repeats_is_calibrated_on_validation() -> None:
    """Whatever the weight after training: ids memorise the training sessions."""
    for repeats in (True, False):
        model = random_model()
        assert model.repeat_weights is not None
        model.repeat_weights.fill_(-1.0)
        sessions = [[a, b, a, b, a, b] if repeats else [a, b, 20 + a, 20 + b, 30 + a, 35] for a in range(5) for b in range(5, 9)]
        valid = pack(np.concatenate(sessions).astype(np.int32), np.arange(0, 121, 6), 8)
        calibrate(model, valid, partial(model_ranks, model, valid))
        assert bool((model.repeat_weights >= 0).all() if repeats else (model.repeat_weights <= -1).all())


def test_the_weight_of_ids_is_lowered_where_content_ranks_better_on_validation_and_never_raised() -> None:
    """Ids of random vectors and a high weight, as of a channel that has memorised its sessions; content of what goes together."""
    for useful in (True, False):
        model = random_model()
        bias = model.channel("id").weight_bias.bias
        bias.fill_(3.0)
        model.content.copy_(torch.randn(ITEMS // 2, model.config.content_dim).repeat_interleave(2, 0) if useful else model.content)
        before = bias.item()
        sessions = [[2 * n, 2 * n + 1] for n in range(ITEMS // 2 - COLD)] * 12
        valid = pack(np.concatenate(sessions).astype(np.int32), np.arange(0, 2 * len(sessions) + 1, 2), 8)
        calibration = calibrate(model, valid, partial(model_ranks, model, valid))
        assert bias.item() == pytest.approx(before + calibration.ids)
        assert calibration.ids < 0 if useful else calibration.ids <= 0


def cold_sessions(together: bool, count: int) -> Windows:
    """Validation sessions in which cold items follow each other, or only warm ones, and `count` cold targets or a few more."""
    warm, cold = range(0, 20), range(ITEMS - COLD, ITEMS)
    sessions: list[list[int]] = []
    for n in range(count // (2 if together else 1)):
        a = n % 10
        old, late = [warm[a], warm[a + 10], warm[19 - a]], [cold[(a + m) % COLD] for m in range(3)]
        sessions += [old, late] if together else [[old[0], late[0], old[1]]]
    return pack(np.concatenate(sessions).astype(np.int32), np.arange(0, 3 * len(sessions) + 1, 3), 8)


def test_the_weights_of_cold_items_are_calibrated_on_validation() -> None:
    """After a warm item and after another cold one: ID dropout hides items at random, so training cannot tell these apart."""
    for together in (True, False):
        model = random_model()
        model.cold_weights.zero_()
        model.popularity_prior.fill_(1.0)  # high enough that calibration can lower the weights
        valid = cold_sessions(together, 200)
        calibration = calibrate(model, valid, partial(model_ranks, model, valid))
        after_warm, after_cold, _ = model.cold_weights.tolist()
        assert after_warm < 0 < after_cold if together else after_warm > 0
        assert (calibration.cold_after_warm, calibration.cold_after_cold) == (after_warm, after_cold)
        assert calibration.cold_targets == 200 and calibration.cold_targets_after_cold == (200 if together else 0)


def test_cold_targets_keep_most_of_their_hit_rate() -> None:
    """Many warm targets and few cold ones, with random content: without a floor calibration would rank cold items last."""
    model = random_model()
    model.cold_weights.zero_()
    model.popularity_prior.fill_(2.0)
    cold = cold_sessions(False, 120)
    warm = pack(np.tile(np.arange(20, dtype=np.int32), 60), np.arange(0, 1201, 4), 8)
    width = max(cold.inputs.shape[1], warm.inputs.shape[1])

    def widened(windows: Windows) -> list[np.ndarray]:
        pad = ((0, 0), (0, width - windows.inputs.shape[1]))
        return [np.pad(array, pad, constant_values=PAD) for array in (windows.inputs, windows.targets)]

    inputs, targets = (np.concatenate(parts) for parts in zip(widened(cold), widened(warm), strict=True))
    valid = Windows(inputs, targets, np.arange(len(inputs)))
    is_cold = targets[targets != PAD] >= ITEMS - COLD
    before = (model_ranks(model, valid)[is_cold] <= 20).mean()
    calibrate(model, valid, partial(model_ranks, model, valid))
    assert (model_ranks(model, valid)[is_cold] <= 20).mean() >= 0.8 * before > 0


@pytest.mark.parametrize("count", [0, 98])
def test_with_few_cold_targets_cold_items_keep_their_weights(count: int) -> None:
    """Otherwise a validation set before the launch of new items would rank them last."""
    model = random_model()
    model.popularity_prior.fill_(1.0)
    before = model.cold_weights.clone()
    warm = pack(np.tile(np.arange(6, dtype=np.int32), 40), np.arange(0, 241, 6), 8)
    valid = cold_sessions(True, count) if count else warm
    calibration = calibrate(model, valid, partial(model_ranks, model, valid))
    assert torch.equal(model.cold_weights, before) and calibration.cold_targets == count
    assert f"cold targets in validation: {count}, fewer than 100" in calibration.summary()
