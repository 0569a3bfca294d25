"""One kind of item vectors in a session: graph and attention over its items, a query at each position, and how much each counts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommender.session_model.config import MAX_SCALE, NEVER, Parts
from recommender.session_model.ops import causal, packed, padded, share, steps_back


class SessionGraph(nn.Module):
    """One gated step over the transitions inside the session, as far as known at each position."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.into = nn.Linear(dim, dim, bias=False)
        self.out_of = nn.Linear(dim, dim, bias=False)
        self.cell = nn.GRUCell(2 * dim, dim)
        self.gate = nn.Parameter(torch.zeros(()))  # the graph starts silent and is let in as far as it helps

    def forward(self, states: Tensor, rows: Tensor, real: Tensor) -> Tensor:
        """states (B, L, D), rows (B, L), real (B, L) -> (B, L, D)"""
        before, after = transitions(rows, real)
        messages = torch.cat([self.into(packed(before @ states, real)), self.out_of(packed(after @ states, real))], -1)
        own = packed(states, real)
        return padded(own + self.gate * (self.cell(messages, own) - own), real)


def transitions(rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """rows (B, L) -> (B, L, L) twice, rows summing to 1 or 0: for t, the positions s <= t just before, and just after,
    an occurrence of t's item."""
    length = rows.shape[1]
    same = (rows[:, :, None] == rows[:, None, :]) & causal(length, rows.device) & real[:, None, :]
    before, after = torch.zeros_like(same), torch.zeros_like(same)
    before[:, :, :-1] = same[:, :, 1:]
    after[:, :, 1:] = same[:, :, :-1] & causal(length, rows.device)[:, 1:] & real[:, None, 1:]
    return share(before), share(after)


class Attention(nn.Module):
    """What each position reads of the ones up to it."""

    def __init__(self, dim: int, max_prefix: int) -> None:
        super().__init__()
        self.dim = dim
        self.ask = nn.Linear(dim, dim)
        self.answer = nn.Linear(dim, dim, bias=False)
        self.recency = nn.Parameter(torch.zeros(max_prefix))
        self.read = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.read.weight)

    def forward(self, states: Tensor, real: Tensor, open_: Tensor, back: Tensor) -> Tensor:
        """states (B, L, D), real (B, L), open_ (B, L, L), back (L, L) -> (E, D) of the real positions"""
        own = packed(states, real)
        asked, answers = padded(self.ask(own), real), padded(self.answer(own), real)
        weights = asked @ answers.transpose(1, 2) / self.dim**0.5 + self.recency[back]
        read: Tensor = self.read(packed(weights.masked_fill(~open_, NEVER).softmax(-1) @ states, real))
        return read


class Channel(nn.Module):
    """Item vectors of one kind -> at each position a query, and how much each earlier query still counts."""

    def __init__(self, dim: int, max_prefix: int, parts: Parts) -> None:
        super().__init__()
        self.dim = dim
        self.graph = SessionGraph(dim) if parts.graph else None
        self.attention = Attention(dim, max_prefix) if parts.attention else None
        self.last = nn.Linear(dim, dim, bias=False)
        self.weigh = nn.Linear(dim, dim)
        self.weighed = nn.Linear(dim, dim, bias=False)
        self.merit = nn.Linear(dim, 1)  # how telling an item is, whatever came after it
        self.weight_recency = nn.Parameter(torch.zeros(max_prefix))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.popularity = nn.Parameter(torch.tensor(0.5)) if parts.popularity else 0.0  # exponent of an item's count in its prior
        nn.init.eye_(self.last.weight)
        for layer in (self.weigh, self.merit):
            nn.init.zeros_(layer.weight)
        for layer in (self.weigh, self.merit):
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.weight_recency[0] = 2.0

    def forward(self, states: Tensor, rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """states (B, L, D) -> queries (B, L, D), log-weights (B, L, L)"""
        if self.graph is not None:
            states = self.graph(states, rows, real)
        back = steps_back(rows.shape[1], rows.device)
        open_ = causal(rows.shape[1], rows.device) & real[:, None, :]
        own = packed(states, real)
        queries = self.last(own)
        if self.attention is not None:
            queries = queries + self.attention(states, real, open_, back)
        queries = self.log_scale.exp().clamp(max=MAX_SCALE) * F.normalize(queries, dim=-1)
        weigh, weighed, merit = (padded(layer(own), real) for layer in (self.weigh, self.weighed, self.merit))
        weights = weigh @ weighed.transpose(1, 2) / self.dim**0.5 + merit.transpose(1, 2) + self.weight_recency[back]
        return padded(queries, real), weights.masked_fill(~open_, NEVER)
