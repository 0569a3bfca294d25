"""Encodes sessions as HSTU, small: hierarchical sequential transduction units (Zhai et al., Actions Speak Louder than Words, ICML 2024).

A unit projects norm(x) to u, v, q and k through SiLU, and attends without a softmax: silu(q k + relative bias) / n, which keeps how strong
the evidence is and not only its shares. Its output is x + W(u * norm(attended)). Departures: two units of one head; the relative bias is
one of positions, without that of times, which many logs lack; and n is the longest prefix, so that padding changes nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommender.baselines.sasrec import CausalStack
from recommender.session_model.ops import causal, steps_back


class TransductionUnit(nn.Module):
    """Computes one unit."""

    def __init__(self, dim: int, max_prefix: int, dropout: float) -> None:
        super().__init__()
        self.longest = max_prefix
        self.dropout = nn.Dropout(dropout)
        self.norm, self.attended_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.project, self.out = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(max_prefix))  # by distance

    def forward(self, states: Tensor) -> Tensor:
        gates, values, queries, keys = F.silu(self.project(self.norm(states))).chunk(4, -1)
        length = states.shape[1]
        weights = F.silu(queries @ keys.transpose(1, 2) + self.bias[steps_back(length, states.device)]) / self.longest
        attended = (weights * causal(length, states.device)) @ values  # padding is on the right, after all real positions
        updated: Tensor = states + self.out(self.dropout(gates * self.attended_norm(attended)))
        return updated


class HSTU(CausalStack):
    """Encodes a session by transduction units."""

    def __init__(self, dim: int, max_prefix: int, dropout: float) -> None:
        super().__init__(lambda: TransductionUnit(dim, max_prefix, dropout), dim, max_prefix, dropout)
