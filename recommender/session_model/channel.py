"""Encodes a session with the item vectors of one channel (content or id): at each position a query and the positions' log-weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommender.session_model.config import LOG_ZERO, MAX_SCALE, Parts
from recommender.session_model.ops import causal, packed, padded, share, steps_back


class SessionGraph(nn.Module):
    """Updates each state by one gated step over the transitions of the session, those up to its position (a causal SR-GNN step)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.incoming = nn.Linear(dim, dim, bias=False)
        self.outgoing = nn.Linear(dim, dim, bias=False)
        self.cell = nn.GRUCell(2 * dim, dim)
        self.gate = nn.Parameter(torch.zeros(()))  # starts at 0: training lets the graph in as far as it helps

    def forward(self, states: Tensor, rows: Tensor, real: Tensor) -> Tensor:
        """states (B, L, D), rows (B, L), real (B, L) -> (B, L, D)"""
        before, after = transitions(rows, real)
        messages = torch.cat([self.incoming(packed(before @ states, real)), self.outgoing(packed(after @ states, real))], -1)
        events = packed(states, real)
        return padded(events + self.gate * (self.cell(messages, events) - events), real)


def transitions(rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Computes two row-normalised adjacency matrices (B, L, L) of rows (B, L), whose lines sum to 1 or 0: for position t, the positions
    s <= t directly before, and directly after, an occurrence of t's item."""
    length = rows.shape[1]
    same = (rows[:, :, None] == rows[:, None, :]) & causal(length, rows.device) & real[:, None, :]
    before, after = torch.zeros_like(same), torch.zeros_like(same)
    before[:, :, :-1] = same[:, :, 1:]
    after[:, :, 1:] = same[:, :, :-1] & causal(length, rows.device)[:, 1:] & real[:, None, 1:]
    return share(before), share(after)


class Attention(nn.Module):
    """Attends from each position to the positions up to it, with a learned bias for their distance."""

    def __init__(self, dim: int, max_prefix: int) -> None:
        super().__init__()
        self.dim = dim
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.recency = nn.Parameter(torch.zeros(max_prefix))
        self.output = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, states: Tensor, real: Tensor, mask: Tensor, back: Tensor) -> Tensor:
        """states (B, L, D), real (B, L), mask (B, L, L) bool, back (L, L) -> (E, D) of the real positions"""
        events = packed(states, real)
        queries, keys = padded(self.query(events), real), padded(self.key(events), real)
        weights = queries @ keys.transpose(1, 2) / self.dim**0.5 + self.recency[back]
        output: Tensor = self.output(packed(weights.masked_fill(~mask, LOG_ZERO).softmax(-1) @ states, real))
        return output


class Channel(nn.Module):
    """Computes from item vectors of one kind a query at each position, and at each position t the log-weights of the queries s <= t."""

    def __init__(self, dim: int, max_prefix: int, parts: Parts) -> None:
        super().__init__()
        self.dim = dim
        self.graph = SessionGraph(dim) if parts.graph else None
        self.attention = Attention(dim, max_prefix) if parts.attention else None
        self.last = nn.Linear(dim, dim, bias=False)
        self.weight_query = nn.Linear(dim, dim)
        self.weight_key = nn.Linear(dim, dim, bias=False)
        self.weight_bias = nn.Linear(dim, 1)  # log-weight of an item that does not depend on the items after it
        self.weight_recency = nn.Parameter(torch.zeros(max_prefix))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.popularity_exponent = nn.Parameter(torch.tensor(0.5)) if parts.popularity else 0.0  # of an item's count in its prior
        nn.init.eye_(self.last.weight)
        for layer in (self.weight_query, self.weight_bias):
            nn.init.zeros_(layer.weight)
        for layer in (self.weight_query, self.weight_bias):
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.weight_recency[0] = 2.0

    def forward(self, states: Tensor, rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """states (B, L, D), rows (B, L), real (B, L) -> queries (B, L, D) with the channel's scale, log-weights (B, L, L)"""
        if self.graph is not None:
            states = self.graph(states, rows, real)
        back = steps_back(rows.shape[1], rows.device)
        mask = causal(rows.shape[1], rows.device) & real[:, None, :]
        events = packed(states, real)
        queries = self.last(events)
        if self.attention is not None:
            queries = queries + self.attention(states, real, mask, back)
        queries = self.log_scale.exp().clamp(max=MAX_SCALE) * F.normalize(queries, dim=-1)
        weight_layers = (self.weight_query, self.weight_key, self.weight_bias)
        weight_queries, weight_keys, biases = (padded(layer(events), real) for layer in weight_layers)
        weights = weight_queries @ weight_keys.transpose(1, 2) / self.dim**0.5 + biases.transpose(1, 2) + self.weight_recency[back]
        return padded(queries, real), weights.masked_fill(~mask, LOG_ZERO)
