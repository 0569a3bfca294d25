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


def test_the_law_is_where_the_loss_of_every_block_rests() -> None:
    """Whatever a block holds, popular items or rare ones: no correction for how often it holds them is due."""
    rng, items = np.random.default_rng(1), 12
    law = (1 + np.arange(items)) ** -1.2 * np.exp(0.5 * rng.normal(size=(items, items)))  # popular items first
    sessions = [[i, j] for i in range(items) for j in range(items) if i != j for _ in range(round(20 * law[i, j]) + 1)]
    blocks = Blocks(log_of(*sessions), items, size=6, window=1, popularity=0.0)
    for _ in range(20):
        facts = blocks.facts(drawn_block(blocks, rng))
        query = facts["pairs"].clamp(min=1e-9).log().requires_grad_()
        transition_loss(query, torch.eye(len(query)), facts["pairs"], facts["bias"]).backward()
        assert query.grad is not None
        assert query.grad.abs().max() < 1e-6
