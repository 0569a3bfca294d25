"""The models of the literature: causality, padding, what they learn, and cold items."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from recommender.baselines.registry import ENCODERS
from recommender.baselines.sequence_model import SequenceModel
from recommender.baselines.sr_gnn import SRGNN
from recommender.metrics.evaluator import model_ranks
from recommender.session_model.negative_sampling import everything
from recommender.session_model.windows import PAD, pack, pad_prefixes

ITEMS, COLD, DIM = 30, 4, 16  # the last items are in no training session
EACH_MODEL = pytest.mark.parametrize("name", ENCODERS)
COUNTS = (np.arange(ITEMS) < ITEMS - COLD).astype(int)


def build(name: str, content: np.ndarray | None = None, ids: bool = True) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ENCODERS[name], COUNTS, content, ids, DIM, max_prefix=8, dropout=0.1)


@EACH_MODEL
def test_a_later_event_changes_nothing_before_it(name: str) -> None:
    model = build(name).eval()
    rows = torch.tensor([[3, 7, 3, 9, 7, 1]])
    with torch.no_grad():
        before = model.encode(rows, model.tables())
        for later in (2, 3, 21):
            changed = rows.clone()
            changed[0, 3:] = later
            after = model.encode(changed, model.tables())
            assert torch.allclose(before[:, :3], after[:, :3], atol=1e-6)
            assert not torch.allclose(before[:, 5], after[:, 5], atol=1e-3)


@EACH_MODEL
def test_padding_and_other_sessions_of_a_batch_change_nothing(name: str) -> None:
    model = build(name).eval()
    sessions = [[3, 7, 3], [1], [5, 5, 9, 2, 8, 3, 7]]
    rows = torch.tensor(pad_prefixes(sessions, 8)).long()
    with torch.no_grad():
        tables = model.tables()
        together = model.encode(rows, tables)
        for line, session in zip(together, sessions, strict=True):
            alone = model.encode(torch.tensor([session]), tables)[0]
            assert torch.allclose(alone, line[: len(session)], atol=1e-5)


def test_the_graph_of_a_prefix_is_the_one_of_the_paper() -> None:
    """SR-GNN on the last prefix, with the adjacency built item by item as the paper describes it."""
    torch.manual_seed(0)
    model, session = SRGNN(DIM, 8, 0.0), [3, 7, 3, 9, 7, 3, 3]
    table = torch.randn(ITEMS, DIM)
    nodes = sorted(set(session))
    adjacency = torch.zeros(len(nodes), len(nodes))
    for a, b in pairwise(session):
        adjacency[nodes.index(a), nodes.index(b)] = 1
    incoming, outgoing = adjacency.sum(0).clamp(min=1), adjacency.sum(1).clamp(min=1)
    with torch.no_grad():
        hidden = table[nodes]
        messages = torch.cat(
            [(adjacency / incoming).T @ model.incoming(hidden), (adjacency / outgoing[:, None]) @ model.outgoing(hidden)], 1
        )
        hidden = model.cell(messages, hidden)
        events = hidden[[nodes.index(item) for item in session]]
        weights = model.weight((model.query(events[-1]) + model.key(events)).sigmoid())
        wanted = model.combine(torch.cat([events[-1], (weights * events).sum(0)]))
        session_vector = model(table[torch.tensor([session])], torch.tensor([session]))[0, -1]
    assert torch.allclose(session_vector, wanted, atol=1e-5)


@EACH_MODEL
@pytest.mark.parametrize("content", [False, True])
def test_deterministic_transitions_are_learned(name: str, content: bool) -> None:
    rng = np.random.default_rng(0)
    warm = ITEMS - COLD
    next_item = rng.permutation(warm)
    sessions = [[first := int(rng.integers(warm)), *(first := int(next_item[first]) for _ in range(4))] for _ in range(128)]
    windows = pack(np.concatenate(sessions).astype(np.int32), np.arange(129) * 5, 8)
    vectors = np.eye(ITEMS) * ITEMS**0.5  # of variance 1, as whitened ones have
    model = build(name, vectors if content else None, ids=not content).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    rows, targets = torch.tensor(windows.inputs).long(), torch.tensor(windows.targets).long()
    for _ in range(120):
        loss = model(rows, targets, model.draw_known(generator), everything(model.known), generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model_ranks(model, windows) == 1).mean() > 0.98


@EACH_MODEL
def test_a_cold_item_ranks_by_its_vector_and_last_by_its_id(name: str) -> None:
    rows, cases = torch.tensor([[3, 7, 12]]), torch.tensor([[False, False, True]])
    content = np.random.default_rng(0).normal(size=(ITEMS, 12)).astype(np.float32)
    with torch.no_grad():
        model = build(name, content, ids=False).eval()
        scores = model.scores(rows, model.tables(), cases)[0]
        best, cold = int(scores[: ITEMS - COLD].argmax()), ITEMS - 1
        model.content[cold] = model.content[best]
        assert model.scores(rows, model.tables(), cases)[0, cold] == pytest.approx(float(scores[best]), abs=1e-5)
        model = build(name).eval()
        assert torch.isneginf(model.scores(rows, model.tables(), cases)[0]).tolist() == (COUNTS == 0).tolist()


def test_dropout_is_drawn_from_the_step_alone() -> None:
    model = build("SASRec").train()
    rows, targets = torch.tensor([[3, 7, 3]]), torch.tensor([[7, 3, PAD]])
    losses = [model(rows, targets, model.known, everything(model.known), torch.Generator().manual_seed(step)) for step in (1, 2, 1)]
    assert torch.equal(losses[0], losses[2])
    assert not torch.equal(losses[0], losses[1])
