"""Encodes sessions as GCE-GNN: attention over the session's graph and over a graph of all sessions (Wang et al., Global Context Enhanced
Graph Neural Networks for Session-based Recommendation, SIGIR 2020).

Each prefix is a graph of its distinct items, whose edges are of four kinds: in, out, both, and to the item itself. An item attends to its
neighbours there, by a vector of the kind, and to the items that stood nearest to it in all training sessions, by the mean of the prefix.
The sum of both views and a position counted from the end give each event its weight. All (prefix, event) pairs of a batch are computed
side by side. Departures from the paper: the count of an edge of the global graph enters as a logarithm, and an item with fewer
neighbours than `NEAREST` has no repeated ones.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommender.baselines.sequence_model import SessionsEncoder
from recommender.baselines.sr_gnn import edges
from recommender.session_model.config import LOG_ZERO
from recommender.session_model.ops import causal
from recommender.session_model.pair_counts import pair_keys
from recommender.session_model.windows import PAD

NEAREST, STEPS = 12, 3  # neighbours of an item in the global graph, and how far apart in a session a pair may stand


class GCEGNN(SessionsEncoder):
    """Encodes each prefix of a session by its graph and the graph of all training sessions."""

    near: Tensor
    closeness: Tensor

    def __init__(self, dim: int, max_prefix: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.kinds = nn.Parameter(torch.randn(4, dim) / dim**0.5)  # of edges: to itself, out, in, both
        self.session_layer, self.score_layer = nn.Linear(dim + 1, dim, bias=False), nn.Linear(dim, 1, bias=False)
        self.combine = nn.Linear(2 * dim, dim, bias=False)
        self.positions = nn.Parameter(torch.randn(max_prefix, dim) / dim**0.5)
        self.place = nn.Linear(2 * dim, dim, bias=False)
        self.event_layer, self.mean_layer = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.weight = nn.Linear(dim, 1, bias=False)

    def read_sessions(self, rows: np.ndarray, offsets: np.ndarray, items: int) -> None:
        near, counts = nearest_items(rows, offsets, items)
        self.register_buffer("near", torch.as_tensor(near))  # (N, K), PAD where there are fewer
        self.register_buffer("closeness", torch.as_tensor(counts, dtype=torch.float32).log1p())  # (N, K)

    def forward(self, states: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
        """states (B, L, D), rows (B, L), vectors (N, D) of all items -> session vectors (B, L, D)"""
        real = rows != PAD
        session, last = real.nonzero(as_tuple=True)
        inside = causal(rows.shape[1], rows.device)[last] & real[session]  # (P, L): the events of each prefix
        length = (last + 1)[:, None]
        prefix, place = inside.nonzero(as_tuple=True)  # (M,) the pairs of a prefix and one of its events
        mean = torch.bmm(inside[:, None].to(states.dtype), states[session])[:, 0] / length  # (P, D)
        row = rows[session[prefix], place]
        own = states[session[prefix], place]
        near = self.in_session(states, rows, session, inside)[prefix, place]
        events = self.dropout(near) + self.dropout(self.in_all_sessions(own, row, mean[prefix], vectors))
        event_mean = torch.zeros_like(mean).index_add(0, prefix, events) / length
        placed = self.place(torch.cat([self.positions[last[prefix] - place], events], -1)).tanh()
        weights = self.weight((self.event_layer(placed) + self.mean_layer(event_mean)[prefix]).sigmoid())
        session_vectors = torch.zeros_like(mean).index_add(0, prefix, weights * events)
        return torch.zeros_like(states).masked_scatter(real[..., None], session_vectors.to(states.dtype))

    def in_session(self, states: Tensor, rows: Tensor, session: Tensor, inside: Tensor) -> Tensor:
        """Attends from each event of the prefixes to its item's neighbours in the graph of the prefix: (P, L, D); `session` (P,) and
        `inside` (P, L) are of the prefixes."""
        first = (rows[:, :, None] == rows[:, None, :]).int().argmax(-1)[session]  # (P, L): the node of an item is its first position
        before, after = edges(first, inside)
        itself = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device) & inside[:, None]
        kind = (after > 0) + 2 * (before > 0).int()  # 1: out, 2: in, 3: both
        kind = torch.where(itself, 0, torch.where(kind > 0, kind, 4))
        scores = F.leaky_relu((states[:, None] * self.kinds[:, None]) @ states[:, None].transpose(2, 3), 0.2)  # (B, 4, L, L)
        scores = torch.cat([scores, torch.full_like(scores[:, :1], LOG_ZERO)], 1)[session].gather(1, kind[:, None].long())[:, 0]
        nodes = scores.softmax(-1) @ states[session]
        return nodes.gather(1, first[..., None].expand_as(nodes))

    def in_all_sessions(self, own: Tensor, row: Tensor, mean: Tensor, vectors: Tensor) -> Tensor:
        """Attends from items row (M,), with the vectors `own` (M, D), to their neighbours in the global graph, by the `mean` (M, D) of the
        prefix: (M, D)."""
        near = self.near[row]
        items = vectors[near.clamp(min=0)]  # (M, K, D)
        told = torch.cat([mean[:, None] * items, self.closeness[row][..., None]], -1)
        scores = self.score_layer(F.leaky_relu(self.session_layer(told), 0.2))[..., 0].masked_fill(near == PAD, LOG_ZERO)
        weights = scores.softmax(-1) * (near != PAD)
        seen: Tensor = self.combine(torch.cat([own, (weights[:, None] @ items)[:, 0]], -1)).relu()
        return seen


def nearest_items(rows: np.ndarray, offsets: np.ndarray, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (N, NEAREST) rows of the items that most often stood up to `STEPS` from each item, PAD where there are fewer, and how
    often."""
    steps = [step for step in range(-STEPS, STEPS + 1) if step]
    keys, counts = np.unique(np.concatenate([pair_keys(rows, offsets, items, step) for step in steps]), return_counts=True)
    order = np.lexsort((-counts, keys // items))
    item, other, counts = (keys // items)[order], (keys % items)[order], counts[order]
    place = np.arange(len(item)) - np.searchsorted(item, item)
    near, often = np.full((items, NEAREST), PAD), np.zeros((items, NEAREST), np.int64)
    kept = place < NEAREST
    near[item[kept], place[kept]], often[item[kept], place[kept]] = other[kept], counts[kept]
    return near, often
