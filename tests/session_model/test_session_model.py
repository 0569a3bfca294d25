"""What the session model must not do (look ahead, see padding, use ids it has not) and the loss it must have."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from recommender.metrics.evaluator import model_ranks
from recommender.retrieval.index import ItemIndex, build_indexes
from recommender.session_model.config import LEAST_MASS, ModelConfig, Parts
from recommender.session_model.losses import gbce, log_partition
from recommender.session_model.model import SessionModel
from recommender.session_model.negative_sampling import drawn_evenly, everything, sampled, share_drawn
from recommender.session_model.numpy_model import PairCounts, Ranker
from recommender.session_model.pair_counts import Pairs
from recommender.session_model.popularity_prior import expected_log_counts
from recommender.session_model.whitening import fit_whitening
from recommender.session_model.windows import PAD, Windows, pack, pad_prefixes
from recommender.training.calibration import calibrate

ITEMS, COLD = 50, 6  # the last items are in no training session


def log(count: int = 80) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, size=count)
    return rng.integers(0, ITEMS - COLD, size=lengths.sum()).astype(np.int32), np.cumsum([0, *lengths])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(content: bool = True, ids: bool = True, parts: Parts | None = None, seed: int = 0) -> SessionModel:
    """A model whose every part is at work."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(ITEMS, 12)).astype(np.float32)
    config = ModelConfig(ITEMS, 12 if content else 0, ids, dim=16, max_prefix=8, parts=parts or Parts())
    model = SessionModel(config, vectors if content else None, *log())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


VERSIONS = pytest.mark.parametrize(("content", "ids"), [(True, True), (True, False), (False, True)])


@VERSIONS
def test_a_later_event_changes_nothing_before_it(content: bool, ids: bool) -> None:
    model = build(content, ids)
    tables = model.tables()
    rows = torch.tensor([[3, 7, 3, 9, 7, 1]])
    first = torch.tensor([[True, True, True, False, False, False]])
    before = model.scores(rows, tables, first)
    for later in (2, 3, 45):
        changed = rows.clone()
        changed[0, 3:] = later
        assert torch.allclose(model.scores(changed, tables, first), before, atol=1e-5)


@VERSIONS
def test_padding_and_company_change_nothing(content: bool, ids: bool) -> None:
    model = build(content, ids)
    tables = model.tables()
    sessions = [[3, 7, 3], [1], [5, 5, 9, 2, 48, 3, 7]]
    together = model.scores(torch.tensor(pad_prefixes(sessions, 8)).long(), tables)
    for session, line in zip(sessions, together, strict=True):
        alone = model.scores(torch.tensor([session]), tables)[0]
        assert torch.allclose(alone, line, atol=1e-4)


@VERSIONS
@pytest.mark.parametrize("left_out", [[], ["graph", "attention", "followers", "companions", "repeat", "popularity"]])
def test_one_session_is_scored_as_many_are(content: bool, ids: bool, left_out: list[str]) -> None:
    """What serving computes in numpy is what training and evaluation compute in PyTorch, and its origins add up to it."""
    model = build(content, ids, Parts(**dict.fromkeys(left_out, False)))
    tables, items = model.tables(), np.array([2, 9, 30, 48])  # none of the session's
    ranker = Ranker.of(model)
    for session in ([3], [5, 5, 7, 11, 3, 7], [7, 49, 7], list(range(10, 22))):  # 49 is cold, 12 are more than are read
        wanted = model.scores(torch.tensor(pad_prefixes([session], 8)).long(), tables)[0].detach().numpy()
        read = ranker.read(session)
        assert np.allclose(ranker.scores(read, np.arange(ITEMS)), wanted, atol=1e-4)
        assert np.allclose(ranker.scores(read, items), wanted[items], atol=1e-4)
        parts = ranker.origins(read, items, ranker.shares(read, items))
        assert len(parts) == len(session[-8:]) + 1
        assert np.allclose(np.log(np.maximum(parts.sum(0), LEAST_MASS)), wanted[items], atol=1e-4)


def test_a_scale_that_ran_away_still_ranks() -> None:
    """exp of a logit above 88 is no float32: what would be infinite for several items would be their tie."""
    model = build()
    with torch.no_grad():
        for channel in model.channels.values():
            channel.log_scale.fill_(6.0)
    tables = model.tables()
    scores = model.scores(torch.tensor([[3, 7, 12]]), tables)[0].detach().numpy()
    assert np.isfinite(scores).all()
    assert len(np.unique(scores.round(3))) > ITEMS / 2
    ranker = Ranker.of(model)
    assert np.allclose(ranker.scores(ranker.read([3, 7, 12]), np.arange(ITEMS)), scores, atol=1e-3)


@VERSIONS
def test_the_loss_is_the_softmax_of_the_scores(content: bool, ids: bool) -> None:
    """On sessions that are not part of the training log, the counts hold nothing of them to take out."""
    model = build(content, ids)
    for _, pairs in model.counted():
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


def test_gbce_counts_what_was_drawn_and_raises_the_target_s_probability_to_beta() -> None:
    model, targets = build(content=False), torch.tensor([[7, 3, PAD]])
    candidates = drawn_evenly(model.known, targets, 11, 0.5, torch.Generator().manual_seed(0))
    drawn = set(candidates.items[candidates.correction == 0].tolist())
    assert len(drawn) == 11 and set(candidates.items.tolist()) == drawn | {3, 7}
    assert candidates.beta == pytest.approx(1 - 0.5 * (1 - 11 / (ITEMS - COLD)))
    logits = torch.randn(2, len(candidates.items))
    chance = dict(zip(candidates.items.tolist(), logits.sigmoid().T.tolist(), strict=True))
    for case, target in enumerate((7, 3)):
        wanted = -np.log(chance[target][case] ** candidates.beta) - sum(np.log(1 - chance[item][case]) for item in drawn - {target})
        assert float(gbce(logits, torch.tensor([7, 3]), candidates)[case]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["followers", "companions"])
def test_a_session_is_no_evidence_for_itself(name: str) -> None:
    """Counts of pairs leave out the session they are asked for: as if the log did not have it."""
    rows, offsets = log()
    windows = pack(rows, offsets, 8)
    tables = dict(SessionModel(ModelConfig(ITEMS, 0, True, dim=16, max_prefix=8), None, rows, offsets).counted())
    for number in range(5):
        kept = np.ones(len(rows), bool)
        kept[offsets[number] : offsets[number + 1]] = False
        lengths = np.delete(np.diff(offsets), number)
        without = Pairs(rows[kept], np.cumsum([0, *lengths]), ITEMS, 8, tables[name].steps)
        one = windows.take(np.array([number]))
        asked = torch.tensor(one.inputs).long(), torch.tensor(one.targets).long()
        found, weights = tables[name](*asked)
        table = torch.zeros(len(one.inputs[0]), 1, ITEMS)
        without.add(table, asked[0][0][:, None], torch.ones(len(one.inputs[0]), 1, 1))
        session = rows[offsets[number] : offsets[number + 1]]  # the window and the target after it
        length = len(session)
        assert torch.allclose(found[0, : length - 1, :length], table[: length - 1, 0, session], atol=1e-6)
        assert torch.allclose(weights, without.weights(asked[0]), atol=1e-4)


def test_pairs_count_what_stands_so_far_apart_inside_a_session() -> None:
    rows, offsets = np.array([1, 2, 1, 3, 2, 3]), np.array([0, 4, 6])  # 1 2 1 3 | 2 3
    pairs = Pairs(rows, offsets, 5, 8, [-2, 2, 1])
    counted = {(int(key) // 5, int(key) % 5): int(count) for key, count in zip(pairs.keys, pairs.counts, strict=True)}
    assert counted == {(1, 2): 1, (2, 1): 1, (1, 3): 1, (2, 3): 2, (1, 1): 2, (3, 2): 1}


def test_a_catalogue_without_any_pair_has_shares_of_nothing() -> None:
    pairs = Pairs(np.array([0, 1]), np.array([0, 2]), 3, 8, [1])
    for key, value in pairs.over(torch.tensor([0, -1, 1]), 2).items():
        setattr(pairs, key, value)
    pairs.items = 2
    counted = PairCounts({name: tensor.numpy() for name, tensor in pairs.state_dict().items()})
    assert not counted.shares(np.array([0, 1]), np.array([0, 1])).any()


def test_a_sampled_softmax_estimates_the_full_one() -> None:
    """The mean over many samples of the sum over the candidates is the sum over all items, and targets are always in it."""
    model = build(content=False)
    counts = np.bincount(log()[0], minlength=ITEMS)
    targets, generator, logits = torch.tensor([[7, 3, PAD]]), torch.Generator().manual_seed(0), torch.randn(ITEMS)
    whole = everything(model.known)
    wanted, sums = logits[whole.items].exp().sum(), []
    for _ in range(400):
        items, correction, *_ = sampled(share_drawn(counts), targets, 16, generator)
        assert {3, 7} <= set(items.tolist()) <= set(whole.items.tolist()) and torch.equal(items, items.unique())
        sums.append((logits[items] + correction).exp().sum())
    assert abs(torch.stack(sums).mean() / wanted - 1) < 0.05


@pytest.mark.parametrize("bf16", [False, True])
def test_the_sum_over_the_items_has_the_gradient_that_autograd_gives(bf16: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 16), (50, 16), (50,)]
    one, other = ([torch.randn(shape, generator=generator.manual_seed(n)).requires_grad_() for n, shape in enumerate(shapes)] for _ in "ab")
    weight, near = torch.rand(7, generator=generator), 0.03 if bf16 else 1e-5
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = log_partition(*one)
        wanted = (other[0] @ other[1].T + other[2]).float().logsumexp(-1)
        assert torch.allclose(found, wanted, rtol=near)
        for sums in (found, wanted):
            (sums * weight).sum().backward()  # type: ignore[no-untyped-call]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.grad is not None and theirs.grad is not None and mine.grad.dtype == theirs.grad.dtype
        assert (mine.grad - theirs.grad).norm() < near * theirs.grad.norm()


@pytest.mark.parametrize("part", ["graph", "attention", "followers", "companions", "repeat", "popularity"])
def test_a_part_that_is_left_out_leaves_no_weights(part: str) -> None:
    rows = torch.tensor([[3, 7, 3, 9]])
    whole = SessionModel(ModelConfig(ITEMS, 0, True, dim=16, max_prefix=8), None, *log())
    model = SessionModel(ModelConfig(ITEMS, 0, True, dim=16, max_prefix=8, parts=replace(Parts(), **{part: False})), None, *log())
    assert set(dict(model.named_parameters())) < set(dict(whole.named_parameters()))
    assert torch.isfinite(model.scores(rows, model.tables())[0, model.known]).all()


def trained(model: SessionModel, rows: np.ndarray, offsets: np.ndarray) -> SessionModel:
    """`model` after 60 steps on all of these sessions."""
    windows = pack(rows, offsets, 8)
    inputs, targets = (torch.tensor(of).long() for of in (windows.inputs, windows.targets))
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
    """Five items each have one vector and are visited once each, in any order. What is left of the five comes next, though by its vector
    every item goes with itself as well as with them."""
    rng = np.random.default_rng(0)
    rows, offsets = np.concatenate([5 * rng.integers(8) + rng.permutation(5) for _ in range(120)]), np.arange(0, 601, 5)
    torch.manual_seed(0)
    config = ModelConfig(40, 8, False, dim=16, max_prefix=8, parts=Parts(repeat=repeat))
    model = trained(SessionModel(config, np.repeat(np.eye(8, dtype=np.float32), 5, axis=0), rows, offsets), rows, offsets)
    right = []
    for first in range(0, 40, 5):
        scores = model.scores(torch.tensor([[first + 3, first, first + 1]]), model.tables())[0]
        right.append(set(scores.topk(2).indices.tolist()) == {first + 2, first + 4})
    assert all(right) if repeat else not any(right)


def test_a_new_item_comes_as_often_as_its_content_lets_expect() -> None:
    """Of new items that go with the session alike, those that are like items often seen come first; where often seen items are like any
    other, new ones stay as they are."""
    rng = np.random.default_rng(0)
    for told in (True, False):
        kind = np.repeat([0, 1], 20) if told else rng.permutation(np.repeat([0, 1], 20))
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
        assert likely > unlikely + 0.5 if told else abs(likely - unlikely) < 0.5


def test_what_content_lets_expect_of_an_item_does_not_know_its_own_count() -> None:
    rng = np.random.default_rng(0)
    content, known = rng.normal(size=(60, 5)), np.arange(60) < 50
    content -= content[known].mean(0)
    counts = np.where(known, np.exp(content[:, 0] + 0.5 * rng.normal(size=60)), 0.0)
    _, expected = expected_log_counts(content, counts)
    assert np.corrcoef(expected[known], content[known, 0])[0, 1] > 0.9
    changed = counts.copy()
    changed[7] *= 1.5
    shift = np.abs(expected_log_counts(content, changed)[1] - expected)
    assert shift[7] < 0.2 * np.delete(shift, 7).max()
    _, of_noise = expected_log_counts(content, np.where(known, np.exp(rng.normal(size=60)), 0.0))
    assert of_noise.std() < 0.3 * expected.std()


def test_the_weight_of_repeats_is_calibrated_on_validation() -> None:
    """Whatever training made of it, whose ids memorise the training sessions."""
    for again in (True, False):
        model = build()
        assert model.copy is not None
        model.copy.fill_(-1.0)
        sessions = [[a, b, a, b, a, b] if again else [a, b, 20 + a, 20 + b, 30 + a, 35] for a in range(5) for b in range(5, 9)]
        valid = pack(np.concatenate(sessions).astype(np.int32), np.arange(0, 121, 6), 8)
        calibrate(model, valid, partial(model_ranks, model, valid))
        assert bool((model.copy >= 0).all() if again else (model.copy <= -1).all())


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
    """After a warm item and after another cold one: of that ID dropout, which hides items at random, knows nothing."""
    for together in (True, False):
        model = build()
        model.stranger.zero_()
        model.expected.fill_(1.0)  # high enough that there is something to lower
        valid = cold_sessions(together, 200)
        found = calibrate(model, valid, partial(model_ranks, model, valid))
        after_warm, after_cold, _ = model.stranger.tolist()
        assert after_warm < 0 < after_cold if together else after_warm > 0
        assert (found.cold_after_warm, found.cold_after_cold) == (after_warm, after_cold)
        assert found.cold_targets == 200 and found.cold_targets_after_cold == (200 if together else 0)


@pytest.mark.parametrize("count", [0, 98])
def test_with_few_cold_targets_cold_items_keep_what_id_dropout_taught(count: int) -> None:
    """A validation before the launch of new items would otherwise rank them lowest of all."""
    model = build()
    model.expected.fill_(1.0)
    before = model.stranger.clone()
    warm = pack(np.tile(np.arange(6, dtype=np.int32), 40), np.arange(0, 241, 6), 8)
    valid = cold_sessions(True, count) if count else warm
    found = calibrate(model, valid, partial(model_ranks, model, valid))
    assert torch.equal(model.stranger, before) and found.cold_targets == count
    assert f"cold targets in validation: {count}, fewer than 100" in found.summary()


def test_a_cold_item_ranks_by_its_content() -> None:
    """An item never trained on, with the vector of a good candidate, ranks near it; the ID-only model cannot place it."""
    model = build()
    cold = ITEMS - 1
    rows = torch.tensor([[3, 7, 12]])
    with torch.no_grad():
        query = model.read(rows, model.tables()).queries["content"][0, -1]
        best = int((model.tables().vectors["content"][: ITEMS - COLD] @ query).argmax())
        worst = int((model.tables().vectors["content"][: ITEMS - COLD] @ query).argmin())
        ranks = {}
        for source in (best, worst):
            model.content[cold] = model.content[source]
            ranks[source] = int((model.scores(rows, model.tables())[0] > model.scores(rows, model.tables())[0, cold]).sum())
    assert ranks[best] < ranks[worst]
    ids = build(content=False)
    scores = ids.scores(rows, ids.tables())[0]
    assert scores[cold] == scores.min() == pytest.approx(math.log(LEAST_MASS), rel=1e-6)


def test_content_only_ignores_ids_and_id_only_ignores_content() -> None:
    """Of two items with one vector, content alone does not tell which was seen; ids alone are told nothing by vectors."""
    rest = [row for row in range(ITEMS) if row not in (3, 9)]  # these two differ by their counts, and by which was seen
    for ids in (False, True):
        model = build(ids=ids)
        model.content[9] = model.content[3]
        one, two = (model.scores(torch.tensor([[seen, 7, 12]]), model.tables())[0, rest] for seen in (3, 9))
        assert torch.allclose(one, two, atol=1e-5) is not ids
    found = []
    for vectors in (np.zeros((ITEMS, 12), np.float32), np.eye(ITEMS, 12, dtype=np.float32)):
        torch.manual_seed(0)
        model = SessionModel(ModelConfig(ITEMS, 0, True, dim=16, max_prefix=8), vectors, *log())
        found.append(model.scores(torch.tensor([[3, 7, 12]]), model.tables()))
    assert torch.equal(*found)


def test_hidden_ids_are_neither_read_nor_offered() -> None:
    model = build()
    hidden = model.known.clone()
    hidden[[3, 9]] = False
    rows = torch.tensor([[3, 7]])
    before = model.scores(rows, model.tables(hidden))
    with torch.no_grad():
        model.ids.weight[[3, 9]] += 5.0
    assert torch.allclose(model.scores(rows, model.tables(hidden)), before, atol=1e-5)


@pytest.mark.parametrize("allowed", [None, np.arange(ITEMS) % 3 == 0])
def test_the_index_finds_what_scoring_everything_finds(allowed: np.ndarray | None) -> None:
    model = build()
    tables = model.tables()
    ranker = Ranker.of(model)
    index = ItemIndex(build_indexes(ranker, "flat"), ranker)
    assert index.exact
    index.first = 4  # so that the first lists do not hold everything
    rng = np.random.default_rng(3)
    for k in (1, 5, ITEMS):
        for _ in range(20):
            session = rng.integers(0, ITEMS, size=rng.integers(1, 9)).tolist()
            values, found = index.top(ranker.read(session), k, allowed)
            wanted = model.scores(torch.tensor([session]), tables)[0].numpy()
            if allowed is not None:
                wanted[~allowed] = -np.inf
            best = np.sort(wanted)[::-1][:k]
            assert np.allclose(values, best[best > -np.inf], atol=1e-4)
            assert np.allclose(wanted[found], values, atol=1e-4)


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


def test_of_many_numbers_the_main_directions_are_kept() -> None:
    """Three directions among forty with a little noise: three components hold them, whatever they are turned to."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(300, 3))
    vectors = (true @ rng.normal(size=(3, 40)) + 0.05 * rng.normal(size=(300, 40))).astype(np.float32)
    kept = fit_whitening(vectors, np.ones(300, bool), components=3)(vectors)
    assert kept.shape == (300, 3)
    found = kept @ np.linalg.lstsq(kept, true, rcond=None)[0]
    assert np.corrcoef(found.ravel(), true.ravel())[0, 1] > 0.99
    assert fit_whitening(vectors, np.ones(300, bool), components=64)(vectors).shape == (300, 40)


def test_ranks_of_a_window_are_those_of_its_prefixes() -> None:
    model = build()
    rows = np.array([3, 7, 3, 9, 48, 2, 2, 11, 30, 12, 5, 6], np.int32)
    windows = pack(rows, np.array([0, 12]), 8)
    found = model_ranks(model, windows)
    tables = model.tables()
    for n in range(1, 12):
        scores = model.scores(torch.tensor(rows[None, max(0, n - 8) : n]).long(), tables)[0]
        assert found[n - 1] == pytest.approx(1 + int((scores > scores[rows[n]]).sum()) + (int((scores == scores[rows[n]]).sum()) - 1) / 2)
