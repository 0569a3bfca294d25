"""Encodes sessions as eSASRec: SASRec with LiGR blocks (Tikhonovich et al., arXiv 2508.06450; LiGR: Borisyuk et al., arXiv 2502.03417).

A block computes x + sigmoid(W x) * f(norm(x)), for self-attention and then for a feed-forward layer with SwiGLU. With the loss `sampled` of
`sbr.loss` this is the paper's model. Departures: two blocks of one head, as SASRec here, where the paper has four of eight; and
candidates are drawn by popularity with a logQ correction, where the paper draws 256 uniformly.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from recommender.baselines.sasrec import CausalStack

WIDER = 4  # the inner layer of SwiGLU, relative to `dim`


class LiGRBlock(nn.Module):
    """Computes causal self-attention and a feed-forward layer, each normalised before and gated after."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.rate = dropout
        self.dropout = nn.Dropout(dropout)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries, self.keys, self.values, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.attention_gate, self.feed_forward_gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.inner, self.linear, self.outer = nn.Linear(dim, WIDER * dim), nn.Linear(dim, WIDER * dim), nn.Linear(WIDER * dim, dim)

    def forward(self, states: Tensor) -> Tensor:
        normed = self.attention_norm(states)
        rate = self.rate if self.training else 0.0
        # padding is on the right, where the causal mask hides it from real positions
        attended = F.scaled_dot_product_attention(
            self.queries(normed), self.keys(normed), self.values(normed), dropout_p=rate, is_causal=True
        )
        states = states + self.attention_gate(states).sigmoid() * self.dropout(self.out(attended))
        normed = self.feed_forward_norm(states)
        forwarded = self.outer(self.dropout(F.silu(self.inner(normed)) * self.linear(normed)))
        gated: Tensor = states + self.feed_forward_gate(states).sigmoid() * self.dropout(forwarded)
        return gated


class ESASRec(CausalStack):
    """Encodes a session by LiGR blocks."""

    def __init__(self, dim: int, max_prefix: int, dropout: float) -> None:
        super().__init__(lambda: LiGRBlock(dim, dropout), dim, max_prefix, dropout, norm=False)
