"""The session model in PyTorch: causality, padding, hidden ids, its loss, and what it learns from small sets of sessions."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.session_models import COLD, ITEMS, random_model, training_sessions
from recommender.metrics.evaluator import model_ranks
from recommender.session_model.config import LEAST_MASS, ModelConfig, Parts
from recommender.session_model.model import SessionModel
from recommender.session_model.negative_sampling import everything
from recommender.session_model.popularity_prior import fit_popularity_prior
from recommender.session_model.windows import PAD, pack, pad_prefixes

VERSIONS = pytest.mark.parametrize(("content", "ids"), [(True, True), (True, False), (False, True)])


@VERSIONS
def test_a_later_event_changes_nothing_before_it(content: bool, ids: bool) -> None:
    model = random_model(content, ids)
    tables = model.tables()
    rows = torch.tensor([[3, 7, 3, 9, 7, 1]])
    first = torch.tensor([[True, True, True, False, False, False]])
    before = model.scores(rows, tables, first)
    for later in (2, 3, 45):
        changed = rows.clone()
        changed[0, 3:] = later
        assert torch.allclose(model.scores(changed, tables, first), before, atol=1e-5)


@VERSIONS
def test_padding_and_other_sessions_of_a_batch_change_nothing(content: bool, ids: bool) -> None:
    model = random_model(content, ids)
    tables = model.tables()
    sessions = [[3, 7, 3], [1], [5, 5, 9, 2, 48, 3, 7]]
    together = model.scores(torch.tensor(pad_prefixes(sessions, 8)).long(), tables)
    for session, line in zip(sessions, together, strict=True):
        alone = model.scores(torch.tensor([session]), tables)[0]
        assert torch.allclose(alone, line, atol=1e-4)


@VERSIONS
def test_the_loss_is_the_softmax_of_the_scores(content: bool, ids: bool) -> None:
    """The pair counts are set to zero, for training would subtract the window's own pairs and ranking would not."""
    model = random_model(content, ids)
    for _, pairs in model.pair_counts():
        pairs.counts.zero_()
        pairs.totals.zero_()
    rows = torch.tensor([[3, 7, 3, 9], [1, 2, PAD, PAD]])
    targets = torch.tensor([[7, 3, 9, 1], [2, 4, PAD, PAD]])
    tables, candidates = model.tables(), everything(model.known)
    warm = candidates.items
    scores = model.scores(rows, tables, targets != PAD)[:, warm]
    column = {int(row): n for n, row in enumerate(warm)}
    wanted = torch.nn.functional.cross_entropy(scores, torch.tensor([column[int(t)] for t in targets[targets != PAD]]), reduction="none")
    assert torch.allclose(model.losses(rows, targets, tables, candidates), wanted, atol=1e-4)


@pytest.mark.parametrize("part", ["graph", "attention", "followers", "companions", "repeat", "popularity"])
def test_a_part_that_is_left_out_leaves_no_weights(part: str) -> None:
    rows = torch.tensor([[3, 7, 3, 9]])
    config = ModelConfig(ITEMS, 0, True, dim=16, max_prefix=8)
    full_model = SessionModel(config, None, *training_sessions())
    model = SessionModel(replace(config, parts=replace(Parts(), **{part: False})), None, *training_sessions())
    assert set(dict(model.named_parameters())) < set(dict(full_model.named_parameters()))
    assert torch.isfinite(model.scores(rows, model.tables())[0, model.known]).all()


def trained(model: SessionModel, rows: np.ndarray, offsets: np.ndarray) -> SessionModel:
    """Trains `model` for 60 steps, each on all of these sessions."""
    windows = pack(rows, offsets, 8)
    inputs, targets = (torch.tensor(array).long() for array in (windows.inputs, windows.targets))
    optimizer, generator = torch.optim.Adam(model.parameters(), 0.02), torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(60):
            optimizer.zero_grad()
            tables = model.tables(model.draw_known(generator))
            model.losses(inputs, targets, tables, everything(model.known)).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize("repeat", [True, False])
def test_it_learns_that_visitors_do_not_come_back_to_an_item(repeat: bool) -> None:
    """Groups of five items share one vector, and a session visits each item of a group once, in random order. The repeat discount learns to
    rank the remaining items of the group first, although by content the items of the prefix are equally similar."""
    rng = np.random.default_rng(0)
    rows, offsets = np.concatenate([5 * rng.integers(8) + rng.permutation(5) for _ in range(120)]), np.arange(0, 601, 5)
    torch.manual_seed(0)
    config = ModelConfig(40, 8, False, dim=16, max_prefix=8, parts=Parts(repeat=repeat))
    model = trained(SessionModel(config, np.repeat(np.eye(8, dtype=np.float32), 5, axis=0), rows, offsets), rows, offsets)
    correct = []
    for first in range(0, 40, 5):
        scores = model.scores(torch.tensor([[first + 3, first, first + 1]]), model.tables())[0]
        correct.append(set(scores.topk(2).indices.tolist()) == {first + 2, first + 4})
    assert all(correct) if repeat else not any(correct)


def test_cold_items_rank_by_the_popularity_prior_of_their_content() -> None:
    """Of cold items that fit the session equally well, those similar to popular items rank first; if content does not correlate with
    popularity, they rank alike."""
    rng = np.random.default_rng(0)
    for correlated in (True, False):
        kind = np.repeat([0, 1], 20) if correlated else rng.permutation(np.repeat([0, 1], 20))
        weights = np.repeat([8.0, 1.0], 20)
        rows, offsets = rng.choice(40, 900, p=weights / weights.sum()), np.arange(0, 901, 3)
        content = np.zeros((44, 2), np.float32)
        content[np.arange(44), np.concatenate([kind, [0, 1, 0, 1]])] = 1.0
        content -= content[:40].mean(0)
        torch.manual_seed(0)
        config = ModelConfig(44, 2, True, dim=8, max_prefix=8, id_dropout=0.2)
        model = trained(SessionModel(config, content, rows, offsets), rows, offsets)
        scores = np.mean([model.scores(torch.tensor([[row]]), model.tables())[0, 40:].numpy() for row in range(40)], axis=0)
        likely, unlikely = scores[[0, 2]].mean(), scores[[1, 3]].mean()
        assert likely > unlikely + 0.5 if correlated else abs(likely - unlikely) < 0.5


def test_the_popularity_prior_of_an_item_leaves_its_own_count_out() -> None:
    rng = np.random.default_rng(0)
    content, known = rng.normal(size=(60, 5)), np.arange(60) < 50
    content -= content[known].mean(0)
    counts = np.where(known, np.exp(content[:, 0] + 0.5 * rng.normal(size=60)), 0.0)
    _, predicted = fit_popularity_prior(content, counts)
    assert np.corrcoef(predicted[known], content[known, 0])[0, 1] > 0.9
    changed = counts.copy()
    changed[7] *= 1.5
    shift = np.abs(fit_popularity_prior(content, changed)[1] - predicted)
    assert shift[7] < 0.2 * np.delete(shift, 7).max()
    _, predicted_noise = fit_popularity_prior(content, np.where(known, np.exp(rng.normal(size=60)), 0.0))
    assert predicted_noise.std() < 0.3 * predicted.std()


def test_a_cold_item_ranks_by_its_content() -> None:
    """A cold item ranks near the warm item whose content vector it has; the ID-only model ranks it last."""
    model = random_model()
    cold = ITEMS - 1
    rows = torch.tensor([[3, 7, 12]])
    with torch.no_grad():
        query = model.encode(rows, model.tables()).queries["content"][0, -1]
        best = int((model.tables().vectors["content"][: ITEMS - COLD] @ query).argmax())
        worst = int((model.tables().vectors["content"][: ITEMS - COLD] @ query).argmin())
        ranks = {}
        for source in (best, worst):
            model.content[cold] = model.content[source]
            ranks[source] = int((model.scores(rows, model.tables())[0] > model.scores(rows, model.tables())[0, cold]).sum())
    assert ranks[best] < ranks[worst]
    ids = random_model(content=False)
    scores = ids.scores(rows, ids.tables())[0]
    assert scores[cold] == scores.min() == pytest.approx(math.log(LEAST_MASS), rel=1e-6)


def test_content_only_ignores_ids_and_id_only_ignores_content() -> None:
    """Content-only does not tell two items with equal vectors apart; ID-only gives the same scores for any vectors."""
    rest = [row for row in range(ITEMS) if row not in (3, 9)]  # the scores of these two differ by their counts and by the repeat component
    for ids in (False, True):
        model = random_model(ids=ids)
        model.content[9] = model.content[3]
        one, two = (model.scores(torch.tensor([[row, 7, 12]]), model.tables())[0, rest] for row in (3, 9))
        assert torch.allclose(one, two, atol=1e-5) is not ids
    scores = []
    for vectors in (np.zeros((ITEMS, 12), np.float32), np.eye(ITEMS, 12, dtype=np.float32)):
        torch.manual_seed(0)
        model = SessionModel(ModelConfig(ITEMS, 0, True, dim=16, max_prefix=8), vectors, *training_sessions())
        scores.append(model.scores(torch.tensor([[3, 7, 12]]), model.tables()))
    assert torch.equal(*scores)


def test_hidden_ids_are_neither_read_nor_offered() -> None:
    model = random_model()
    hidden = model.known.clone()
    hidden[[3, 9]] = False
    rows = torch.tensor([[3, 7]])
    before = model.scores(rows, model.tables(hidden))
    with torch.no_grad():
        model.ids.weight[[3, 9]] += 5.0
    assert torch.allclose(model.scores(rows, model.tables(hidden)), before, atol=1e-5)


def test_ranks_of_a_window_are_those_of_its_prefixes() -> None:
    model = random_model()
    rows = np.array([3, 7, 3, 9, 48, 2, 2, 11, 30, 12, 5, 6], np.int32)
    windows = pack(rows, np.array([0, 12]), 8)
    ranks = model_ranks(model, windows)
    tables = model.tables()
    for n in range(1, 12):
        scores = model.scores(torch.tensor(rows[None, max(0, n - 8) : n]).long(), tables)[0]
        assert ranks[n - 1] == pytest.approx(1 + int((scores > scores[rows[n]]).sum()) + (int((scores == scores[rows[n]]).sum()) - 1) / 2)
