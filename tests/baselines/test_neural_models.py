"""The models of the literature: causality, padding, what they learn, and cold items."""

import math
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch

from recommender.baselines.gce_gnn import GCEGNN
from recommender.baselines.registry import ENCODERS
from recommender.baselines.sequence_model import SequenceModel
from recommender.baselines.sr_gnn import SRGNN
from recommender.metrics.evaluator import model_ranks
from recommender.session_model.negative_sampling import everything
from recommender.session_model.windows import PAD, pack, pad_prefixes

ITEMS, COLD, DIM = 30, 4, 16  # the last items are in no training session
EACH_MODEL = pytest.mark.parametrize("name", ENCODERS)
LOG = np.array([3, 7, 3, 9, 5, 2, 8, 3, 1, 7, 12, 3]), np.array([0, 4, 8, 12])
COUNTS = (np.arange(ITEMS) < ITEMS - COLD).astype(int)


def build(name: str, content: np.ndarray | None = None, ids: bool = True) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ENCODERS[name], COUNTS, content, ids, DIM, max_prefix=8, dropout=0.1, sessions=LOG)


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


def test_the_two_graphs_of_gce_gnn_are_those_of_the_paper() -> None:
    """GCE-GNN on the last prefix, item by item and neighbour by neighbour as the paper describes it."""
    torch.manual_seed(0)
    model, session = GCEGNN(DIM, 8, 0.0), [3, 7, 3, 9, 7, 12, 12]
    model.read_sessions(*LOG, ITEMS)
    table = torch.randn(ITEMS, DIM)
    count: Counter = Counter()
    for a, b in pairwise(LOG[1]):
        for n, m in permutations(range(a, b), 2):
            count[int(LOG[0][n]), int(LOG[0][m])] += abs(n - m) <= 3
    assert {(3, int(n)) for n in model.near[3] if n != PAD} == {pair for pair, times in count.items() if pair[0] == 3 and times}
    steps = set(pairwise(session))

    def kind(a: int, b: int) -> int | None:
        return 0 if a == b else {(True, False): 1, (False, True): 2, (True, True): 3}.get(((a, b) in steps, (b, a) in steps))

    def leaky(value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.leaky_relu(value, 0.2)

    with torch.no_grad():
        mean, events = table[session].mean(0), []
        for item in session:
            linked = [(other, k) for other in dict.fromkeys(session) if (k := kind(item, other)) is not None]
            scores = torch.stack([leaky((table[item] * table[other] * model.kinds[k]).sum()) for other, k in linked])
            local = scores.softmax(0) @ table[[other for other, _ in linked]]
            near = [other for (one, other), times in count.items() if one == item and times]
            told = [torch.cat([mean * table[n], torch.tensor([math.log1p(count[item, n])])]) for n in near]
            weights = model.score_layer(leaky(model.session_layer(torch.stack(told))))[:, 0].softmax(0)
            events.append(local + model.combine(torch.cat([table[item], weights @ table[near]])).relu())
        event_mean, wanted = torch.stack(events).mean(0), torch.zeros(DIM)
        for back, event in enumerate(reversed(events)):
            placed = model.place(torch.cat([model.positions[back], event])).tanh()
            wanted += model.weight((model.event_layer(placed) + model.mean_layer(event_mean)).sigmoid()) * event
        session_vector = model(table[torch.tensor([session])], torch.tensor([session]), table)[0, -1]
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
    assert (model_ranks(model, windows) == 1).mean() > 0.9


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
