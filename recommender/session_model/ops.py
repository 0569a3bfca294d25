"""Operates on padded windows: causal masks, distances in steps, selection of the positions that are no padding.

B windows of L positions hold E real ones. Sessions are short, but the longest of a batch is not: layers that treat every position
alone run over the E real positions (`packed`) instead of all B * L.
"""

import torch
from torch import Tensor


def packed(values: Tensor, real: Tensor) -> Tensor:
    """Selects the real positions: values (B, L, D), real (B, L) bool -> (E, D)."""
    return values.flatten(0, 1).index_select(0, real.flatten().nonzero()[:, 0])


def padded(values: Tensor, real: Tensor) -> Tensor:
    """Puts the values of the real positions back into their places, zeros elsewhere: (E, D), real (B, L) bool -> (B, L, D)."""
    empty = values.new_zeros(real.numel(), values.shape[-1])
    return empty.index_copy(0, real.flatten().nonzero()[:, 0], values).view(*real.shape, -1)


def share(neighbours: Tensor) -> Tensor:
    """Normalises the last dimension of a count or bool tensor to sum 1; a line of zeros stays zero."""
    return neighbours / neighbours.sum(-1, keepdim=True).clamp(min=1)


def find(items: Tensor, rows: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Finds `rows` in `items` (C,), ascending: the index of each, and (bool) whether it is real and among the items. The index of a row
    that is not among them is another item's."""
    place = torch.searchsorted(items, rows).clamp(max=len(items) - 1)
    return place, real & (items[place] == rows)


def causal(length: int, device: torch.device) -> Tensor:
    """Returns the causal mask (L, L) bool: True at (t, s) for s <= t."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


def steps_back(length: int, device: torch.device) -> Tensor:
    """Returns the distances (L, L) t - s in steps, 0 where s > t."""
    position = torch.arange(length, device=device)
    return (position[:, None] - position[None, :]).clamp(min=0)


def last_occurrences(rows: Tensor) -> Tensor:
    """Tells at (t, s), rows (B, L) -> (B, L, L) bool, whether no event after s and up to t has the item of s."""
    place = torch.arange(rows.shape[1], device=rows.device)
    later = (rows[:, :, None] == rows[:, None, :]) & (place > place[:, None])
    following = torch.where(later, place, rows.shape[1]).amin(2)  # (B, s) next position of s's item
    return place[:, None] < following[:, None, :]
