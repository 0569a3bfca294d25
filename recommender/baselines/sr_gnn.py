"""Encodes sessions as SR-GNN: a gated graph network (Wu et al., Session-based Recommendation with Graph Neural Networks, AAAI 2019).

A prefix is a graph of its distinct items with an edge for each transition. One step of a gated network runs over the normalised in- and
outgoing edges; then come attention by the last item and a linear layer over [s_local; s_global]. Every later event changes the graph, so
each prefix of a session has its own; the graphs of a batch are padded tensors. Departure from the paper: dropout.
"""

import torch
from torch import Tensor, nn

from recommender.session_model.ops import causal, share
from recommender.session_model.windows import PAD


class SRGNN(nn.Module):
    """Encodes each prefix of a session by a graph network over its distinct items."""

    def __init__(self, dim: int, max_prefix: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.incoming = nn.Linear(dim, dim)
        self.outgoing = nn.Linear(dim, dim)
        self.cell = nn.GRUCell(2 * dim, dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.weight = nn.Linear(dim, 1, bias=False)
        self.combine = nn.Linear(2 * dim, dim)

    def forward(self, states: Tensor, rows: Tensor) -> Tensor:
        """states (B, L, D), rows (B, L) -> session vectors (B, L, D), one for each of the P events, as the end of a prefix"""
        real = rows != PAD
        session, last = real.nonzero(as_tuple=True)
        inside = causal(rows.shape[1], rows.device)[last] & real[session]  # (P, L): the events of each prefix
        first = (rows[:, :, None] == rows[:, None, :]).int().argmax(-1)[session]  # (P, L): the node of an item is its first position
        node = inside & (first == torch.arange(rows.shape[1], device=rows.device))
        before, after = edges(first, inside)
        items = self.dropout(states)[session]  # (P, L, D)
        messages = torch.cat([before @ self.incoming(items), after @ self.outgoing(items)], -1)
        items = torch.zeros_like(items).masked_scatter(node[..., None], self.cell(messages[node], items[node]).to(items.dtype))
        events = items.gather(1, first[..., None].expand_as(items))
        local = events[torch.arange(len(last), device=rows.device), last]
        weights = self.weight((self.query(local)[:, None] + self.key(events)).sigmoid()) * inside[..., None]
        vectors = self.combine(torch.cat([local, (weights * events).sum(1)], -1))
        return torch.zeros_like(states).masked_scatter(real[..., None], self.dropout(vectors).to(states.dtype))


def edges(first: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Computes two row-normalised adjacency matrices (P, L, L), incoming and outgoing, of the events' nodes `first` (P, L) and the mask
    `inside` (P, L) bool. Lines sum to 1 or 0; a repeated transition counts once."""
    prefix, place = inside[:, 1:].nonzero(as_tuple=True)
    adjacency = torch.zeros(*first.shape, first.shape[1], device=first.device)  # from, to
    adjacency[prefix, first[prefix, place], first[prefix, place + 1]] = 1.0
    return share(adjacency.transpose(1, 2)), share(adjacency)
