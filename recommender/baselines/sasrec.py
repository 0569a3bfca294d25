"""Encodes sessions as SASRec: causal self-attention (Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018).

Two blocks of one head, learned positions, layer norm before attention and before the feed-forward layers. Departures from the paper: the
softmax over all items in place of one negative for each target, which makes a stronger baseline (Klenitskiy and Vasilev, RecSys 2023), or,
with `sbr.loss: gbce`, the loss of gSASRec (Petrov and Macdonald, RecSys 2023); positions count from the start of the window, which is
padded on the right.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = 2


class Block(nn.Module):
    """Computes one block: causal self-attention and two feed-forward layers, each with layer norm, dropout and a residual."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.rate = dropout
        self.dropout = nn.Dropout(dropout)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries, self.keys, self.values, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.feed_forward = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, dim))

    def forward(self, states: Tensor) -> Tensor:
        normed = self.attention_norm(states)
        rate = self.rate if self.training else 0.0
        # padding is on the right, where the causal mask hides it from real positions
        attended = F.scaled_dot_product_attention(
            self.queries(normed), self.keys(states), self.values(states), dropout_p=rate, is_causal=True
        )
        states = states + self.dropout(self.out(attended))
        updated: Tensor = states + self.dropout(self.feed_forward(self.feed_forward_norm(states)))
        return updated


class CausalStack(nn.Module):
    """Encodes a session by `BLOCKS` causal blocks, which `block` makes, over its items and their positions; then a layer norm, or none."""

    def __init__(self, block: Callable[[], nn.Module], dim: int, max_prefix: int, dropout: float, norm: bool = True) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(max_prefix, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, states: Tensor, rows: Tensor) -> Tensor:
        """states (B, L, D), rows (B, L) -> session vectors (B, L, D)"""
        states = states * states.shape[-1] ** 0.5 + self.positions[: rows.shape[1]]
        vectors: Tensor = self.norm(self.blocks(self.dropout(states)))
        return vectors


class SASRec(CausalStack):
    """Encodes a session by causal self-attention."""

    def __init__(self, dim: int, max_prefix: int, dropout: float) -> None:
        super().__init__(lambda: Block(dim, dropout), dim, max_prefix, dropout)
