"""Encodes sessions as GRU4Rec: a GRU (Hidasi et al., Session-based Recommendations with Recurrent Neural Networks, ICLR 2016).

Departures from the paper: trained with the softmax over all items at every position of whole sessions, where the paper has pairwise
losses on session-parallel mini-batches; and one vector for each item, as input and for its score.
"""

from torch import Tensor, nn


class GRU4Rec(nn.Module):
    """Encodes a session by the GRU's hidden state at each position."""

    def __init__(self, dim: int, max_prefix: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(dim, dim, batch_first=True)

    def forward(self, states: Tensor, rows: Tensor) -> Tensor:
        """states (B, L, D), rows (B, L) -> session vectors (B, L, D)"""
        hidden: Tensor = self.dropout(self.gru(self.dropout(states))[0])
        return hidden
