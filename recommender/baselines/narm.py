"""NARM: a GRU whose last state says which earlier ones to attend to (Li et al., Neural Attentive Session-based Recommendation, CIKM 2017).

The session is [c_global; c_local], the last hidden state beside the attended ones, and a bilinear decoder holds it against the
items. Departures: the global and the local encoder are one GRU, and all positions of a session are trained on in one pass.
"""

import torch
from torch import Tensor, nn

from recommender.session_model.ops import causal


class NARM(nn.Module):
    def __init__(self, dim: int, max_prefix: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(dim, dim, batch_first=True)
        self.ask = nn.Linear(dim, dim, bias=False)
        self.answer = nn.Linear(dim, dim, bias=False)
        self.weigh = nn.Linear(dim, 1, bias=False)
        self.decode = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, states: Tensor, rows: Tensor) -> Tensor:
        """states (B, L, D), rows (B, L) -> session vectors (B, L, D)"""
        hidden = self.gru(self.dropout(states))[0]
        weights = self.weigh((self.ask(hidden)[:, :, None] + self.answer(hidden)[:, None]).sigmoid())[..., 0]  # (B, L, L)
        local = (weights * causal(rows.shape[1], rows.device)) @ hidden  # the weights are no shares, as in the paper
        found: Tensor = self.decode(self.dropout(torch.cat([hidden, local], -1)))
        return found
