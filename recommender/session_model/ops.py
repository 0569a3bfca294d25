"""Operations on padded windows that several models share: causal masks, distances, selections of what is not padding."""

import torch
from torch import Tensor

# sessions are short and the longest of a batch is not: what is done to each position alone is done to the E real ones


def packed(values: Tensor, real: Tensor) -> Tensor:
    """(B, L, D) -> (E, D)"""
    return values.flatten(0, 1).index_select(0, real.flatten().nonzero()[:, 0])


def padded(values: Tensor, real: Tensor) -> Tensor:
    """(E, D) -> (B, L, D)"""
    empty = values.new_zeros(real.numel(), values.shape[-1])
    return empty.index_copy(0, real.flatten().nonzero()[:, 0], values).view(*real.shape, -1)


def share(neighbours: Tensor) -> Tensor:
    return neighbours / neighbours.sum(-1, keepdim=True).clamp(min=1)


def find(items: Tensor, rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Where the `rows` stand in `items` (C,), ascending, and which of the `real` ones do."""
    place = torch.searchsorted(items, rows).clamp(max=len(items) - 1)
    return place, real & (items[place] == rows)


def causal(length: int, device: torch.device) -> Tensor:
    """(L, L) bool: at t, which s are past or present."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def steps_back(length: int, device: torch.device) -> Tensor:
    """(L, L): t - s, 0 where s is later."""
    position = torch.arange(length, device=device)
    return (position[:, None] - position[None, :]).clamp(min=0)
