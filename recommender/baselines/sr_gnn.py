"""SR-GNN: a gated graph network over the items of a prefix (Wu et al., Session-based Recommendation with Graph Neural Networks, AAAI 2019).

A prefix is a graph of its distinct items: an edge for each transition, shares of the in- and of the out-going ones, one step of a
gated network; then attention by the last item, and a linear layer over [s_local; s_global]. What comes later changes the graph,
so that every prefix of a session is one of its own; the graphs of a batch are padded tensors all the same. Departure: dropout,
which the paper has none of.
"""

import torch
from torch import Tensor, nn

from recommender.session_model.ops import causal, share
from recommender.session_model.windows import PAD


class SRGNN(nn.Module):
    def __init__(self, dim: int, max_prefix: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.into = nn.Linear(dim, dim)
        self.out_of = nn.Linear(dim, dim)
        self.cell = nn.GRUCell(2 * dim, dim)
        self.ask = nn.Linear(dim, dim)
        self.answer = nn.Linear(dim, dim)
        self.weigh = nn.Linear(dim, 1, bias=False)
        self.unite = nn.Linear(2 * dim, dim)

    def forward(self, states: Tensor, rows: Tensor) -> Tensor:
        """states (B, L, D), rows (B, L) -> session vectors (B, L, D), of its P events one each"""
        real = rows != PAD
        session, last = real.nonzero(as_tuple=True)
        inside = causal(rows.shape[1], rows.device)[last] & real[session]  # (P, L): the events of each prefix
        first = (rows[:, :, None] == rows[:, None, :]).int().argmax(-1)[session]  # (P, L): an item stands where it came first
        node = inside & (first == torch.arange(rows.shape[1], device=rows.device))
        before, after = edges(first, inside)
        items = self.dropout(states)[session]  # (P, L, D)
        messages = torch.cat([before @ self.into(items), after @ self.out_of(items)], -1)
        items = torch.zeros_like(items).masked_scatter(node[..., None], self.cell(messages[node], items[node]).to(items.dtype))
        events = items.gather(1, first[..., None].expand_as(items))
        local = events[torch.arange(len(last), device=rows.device), last]
        weights = self.weigh((self.ask(local)[:, None] + self.answer(events)).sigmoid()) * inside[..., None]
        found = self.unite(torch.cat([local, (weights * events).sum(1)], -1))
        return torch.zeros_like(states).masked_scatter(real[..., None], self.dropout(found).to(states.dtype))


def edges(first: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """(P, L) where each event's item stands, (P, L) bool -> (P, L, L) twice: what an item takes from each of those before it,
    and from each of those after it. Rows sum to 1 or 0; a transition counts once."""
    prefix, place = inside[:, 1:].nonzero(as_tuple=True)
    joined = torch.zeros(*first.shape, first.shape[1], device=first.device)  # from, to
    joined[prefix, first[prefix, place], first[prefix, place + 1]] = 1.0
    return share(joined.transpose(1, 2)), share(joined)
