"""Blocks of items, and the loss of the transitions within them."""

import math

import numpy as np
import pytest
import torch

from pipeline.data.session_log import SessionLog
from pipeline.distill.blocks import Blocks, transition_loss


def log_of(*sessions: list[int]) -> SessionLog:
    offsets = np.cumsum([0, *map(len, sessions)])
    rows = np.concatenate(sessions).astype(np.int32)
    return SessionLog([f"s{n}" for n in range(len(sessions))], rows, offsets, np.arange(len(sessions)), np.arange(len(rows)))


def drawn_block(blocks: Blocks, rng: np.random.Generator) -> np.ndarray:
    sessions = rng.permutation(len(blocks.train))[: blocks.sessions]
    return np.union1d(blocks.rows(sessions, rng), rng.permutation(blocks.known)[: blocks.half])


def test_a_block_is_half_whole_sessions_and_half_random_items() -> None:
    rng = np.random.default_rng(0)
    train = log_of(*(list(rng.choice(200, 5, replace=False)) for _ in range(400)))
    blocks = Blocks(train, items=210, size=64, window=1, popularity=0.0)
    assert blocks.sessions == 6  # of five items each: half of 64
    pairs, expected = 0.0, 0.0
    for _ in range(50):
        block = drawn_block(blocks, rng)
        assert 32 <= len(block) <= 64
        assert (np.diff(block) > 0).all() and block.max() < 200
        pairs += float((blocks.facts(block)["pairs"] > 0).sum())
        expected += len(block) ** 2 * blocks.counts.nnz / 200**2  # of a random block of that size
    assert pairs > 1.1 * expected


def test_the_correction_is_how_often_blocks_hold_an_item() -> None:
    """Popular items are in more blocks: without the correction, the loss would take them for less likely than they are."""
    rng = np.random.default_rng(1)
    shares = np.arange(1, 41) ** -0.8
    train = log_of(*(list(rng.choice(40, 4, replace=False, p=shares / shares.sum())) for _ in range(300)))
    blocks = Blocks(train, items=40, size=16, window=1, popularity=0.0)
    held = np.zeros(40)
    for _ in range(4000):
        held[drawn_block(blocks, rng)] += 1 / 4000
    np.testing.assert_allclose(np.exp(-blocks.bias[0]), held, atol=0.05)


def test_popularity_enters_the_bias_as_far_as_it_is_told_to() -> None:
    train = log_of([0, 1], [0, 1], [0, 1], [2, 3])
    none, half = (Blocks(train, items=4, size=4, window=1, popularity=share).bias for share in (0.0, 0.5))
    followed_by = half[0] - none[0]
    assert followed_by[1] - followed_by[3] == pytest.approx(0.5 * math.log(3))


def test_pairs_weigh_one_over_their_distance_and_never_join_sessions() -> None:
    blocks = Blocks(log_of([0, 1, 2], [3, 0]), items=4, size=8, window=2, popularity=0.0)
    pairs = blocks.facts(np.arange(4))["pairs"]
    expected = torch.zeros(4, 4)
    expected[0, 1] = expected[1, 2] = expected[3, 0] = 1
    expected[0, 2] = 0.5
    assert torch.equal(pairs, expected)


def test_a_known_successor_is_no_negative_and_an_item_without_successors_counts_for_nothing() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], requires_grad=True)
    item = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.8, 0.6]])
    pairs = torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    loss = transition_loss(query, item, pairs, torch.zeros(2, 3))
    after_first = -(0.75 * 1.0 + 0.25 * 0.8 - math.log(math.exp(1.0) + math.exp(0.8)))
    before = [-(0.0 + 1.0 - math.log(math.exp(1.0) + math.exp(0.6))), -(0.8 - math.log(math.exp(0.8) + math.exp(0.6)))]
    assert float(loss.detach()) == pytest.approx((after_first + np.mean(before)) / 2, abs=1e-6)


def test_a_block_without_a_pair_has_no_loss() -> None:
    features = torch.eye(3, requires_grad=True)
    loss = transition_loss(features, features, torch.zeros(3, 3), torch.zeros(2, 3))
    loss.backward()
    assert float(loss.detach()) == 0 and torch.equal(features.grad, torch.zeros(3, 3))


def learned_transitions(log: SessionLog, items: int, corrected: bool) -> np.ndarray:
    """(N, N) what a free similarity, trained by `transition_loss`, says of the next item."""
    blocks, rng = Blocks(log, items, size=12, window=1, popularity=0.0), np.random.default_rng(0)
    similarity = torch.zeros(items, items, requires_grad=True)
    optimizer = torch.optim.Adam([similarity], 0.05)
    for step in range(1200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 1200)
        facts = blocks.facts(drawn_block(blocks, rng))
        block, bias = facts["block"], facts["bias"] if corrected else torch.zeros_like(facts["bias"])
        loss = transition_loss(similarity[block][:, block], torch.eye(len(block)), facts["pairs"], bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return similarity.detach().masked_fill(torch.eye(items, dtype=torch.bool), -1e4).softmax(-1).numpy()


def test_with_the_correction_the_bare_similarity_ranks_by_how_likely_an_item_is() -> None:
    """Popular items are in more blocks, so negatives more often: uncorrected, the similarity learns to push them down."""
    rng, items = np.random.default_rng(1), 24
    law = (1 + np.arange(items)) ** -1.2 * np.exp(0.5 * rng.normal(size=(items, items)))  # popular items first
    np.fill_diagonal(law, 0)
    law /= law.sum(1, keepdims=True)
    log = log_of(*([first, int(rng.choice(items, p=law[first]))] for first in rng.integers(items, size=6000)))
    divergence = {}
    for corrected in (True, False):
        found = learned_transitions(log, items, corrected)
        divergence[corrected] = float((law * np.log(np.maximum(law, 1e-12) / np.maximum(found, 1e-12))).sum(1).mean())
    assert divergence[True] < 0.2
    assert divergence[False] > 2 * divergence[True]
    print(divergence)
