"""The transition directions in closed form, on logs whose law is known."""

import numpy as np
import torch

from pipeline.data.session_log import SessionLog
from pipeline.distill.closed_form import chosen_closed_form, closed_form, linear_fit, mapped, transition_counts

GROUPS, ITEMS, NOISE = 6, 120, 20


def shop(seed: int = 0) -> tuple[torch.Tensor, SessionLog, np.ndarray]:
    """Items of six groups; an item of the next group follows. Features: the group in six numbers, and twenty louder ones of noise."""
    rng = np.random.default_rng(seed)
    group = rng.integers(GROUPS, size=ITEMS)
    features = np.concatenate([np.eye(GROUPS)[group] + 0.1 * rng.normal(size=(ITEMS, GROUPS)), 3 * rng.normal(size=(ITEMS, NOISE))], 1)
    sessions = []
    for _ in range(1500):
        rows = [int(rng.integers(ITEMS))]
        for _ in range(3):
            rows.append(int(rng.choice(np.flatnonzero(group == (group[rows[-1]] + 1) % GROUPS))))
        sessions.append(rows)
    offsets = np.arange(len(sessions) + 1) * 4
    rows = np.concatenate(sessions).astype(np.int32)
    log = SessionLog([f"s{n}" for n in range(len(sessions))], rows, offsets, np.arange(len(sessions)), np.arange(len(rows)))
    return torch.from_numpy(features).float(), log, group


def hits(query: torch.Tensor, item: torch.Tensor, group: np.ndarray) -> float:
    """The share of each item's ten best that are of the next group."""
    best = (query @ item.T).topk(10).indices.numpy()
    return float((group[best] == (group[:, None] + 1) % GROUPS).mean())


def test_directions_are_those_of_transitions_not_of_variance() -> None:
    features, log, group = shop()
    maps = closed_form(features, transition_counts(log, ITEMS, 1), GROUPS - 1, 0.01)
    assert hits(mapped(features, maps.query), mapped(features, maps.item), group) > 0.9
    plain = torch.nn.functional.normalize(features - features.mean(0), dim=-1)
    assert hits(plain, plain, group) < 0.5
    assert hits(mapped(features, maps.item), mapped(features, maps.query), group) < 0.1  # directed: what goes before is another map


def test_settings_are_chosen_on_withheld_items() -> None:
    features, log, group = shop()
    maps, rank = chosen_closed_form(features, log, 24, seed=0)
    assert len(maps.query) == len(maps.item) == 24
    assert rank in (16, 24)
    cut = maps.cut(rank)
    assert hits(mapped(features, cut.query), mapped(features, cut.item), group) > 0.8


def test_without_transitions_there_is_nothing_to_find() -> None:
    """Shuffled sessions: the control."""
    features, log, group = shop()
    shuffled = SessionLog(log.session_ids, np.random.default_rng(1).permutation(log.rows), log.offsets, log.start, log.times)
    maps, _ = chosen_closed_form(features, shuffled, 24, seed=0)
    assert hits(mapped(features, maps.query), mapped(features, maps.item), group) < 0.35


def test_more_directions_than_features_are_not_made_up() -> None:
    features, log, _ = shop()
    maps = closed_form(features[:, :GROUPS], transition_counts(log, ITEMS, 1), 64, 0.1)
    assert maps.query.shape == maps.item.shape == (GROUPS, GROUPS + 1)


def test_a_linear_fit_reproduces_linear_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 10, generator=generator)
    targets = torch.nn.functional.normalize(features @ torch.randn(10, 4, generator=generator) + 0.3, dim=-1)
    fitted = mapped(features, linear_fit(features, targets))
    assert (fitted * targets).sum(-1).mean() > 0.95
