"""Encodes sessions as NARM: a GRU with attention by its last state (Li et al., Neural Attentive Session-based Recommendation, CIKM 2017).

The session is [c_global; c_local], the last hidden state and the attended sum of all, and a bilinear decoder scores it against the items.
Departures from the paper: the global and the local encoder are one GRU, and one pass trains all positions of a session.
"""

import torch
from torch import Tensor, nn

from recommender.session_model.ops import causal


class NARM(nn.Module):
    """Encodes a session by the GRU's hidden state and an attended sum of the earlier ones."""

    def __init__(self, dim: int, max_prefix: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.weight = nn.Linear(dim, 1, bias=False)
        self.decode = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, states: Tensor, rows: Tensor) -> Tensor:
        """states (B, L, D), rows (B, L) -> session vectors (B, L, D)"""
        hidden = self.gru(self.dropout(states))[0]
        weights = self.weight((self.query(hidden)[:, :, None] + self.key(hidden)[:, None]).sigmoid())[..., 0]  # (B, L, L)
        local = (weights * causal(rows.shape[1], rows.device)) @ hidden  # not normalised, as in the paper
        vectors: Tensor = self.decode(self.dropout(torch.cat([hidden, local], -1)))
        return vectors
