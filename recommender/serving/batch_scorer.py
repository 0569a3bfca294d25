"""Scores many sessions against all items, or some of them, in one matrix product of PyTorch: for files of sessions."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from recommender.session_model.config import ModelConfig
from recommender.session_model.model import SessionModel
from recommender.session_model.top_k import first
from recommender.session_model.windows import pad_prefixes

SCORES_AT_ONCE = 8_000_000  # numbers in memory: bounds a batch
ENTRY = 10  # numbers in memory for each entry of a pair-count table that is added, also for an item that a filter excludes


class BatchScorer:
    """Ranks items for batches of sessions with the PyTorch model."""

    def __init__(self, config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> None:
        """`arrays`: the model's `state_dict`."""
        self.model = SessionModel.restored(config, {name: torch.tensor(array) for name, array in arrays.items()}).eval()
        with torch.inference_mode():
            self.tables = self.model.tables()
        begins = (np.searchsorted(pairs.keys.numpy(), np.arange(pairs.items + 1) * pairs.items) for _, pairs in self.model.pair_counts())
        self.entries = sum(map(np.diff, begins), np.zeros(config.items, int))  # (N,) entries of each item in the pair-count tables

    def best(
        self, sessions: list[list[int]], wanted: Mapping[int, int], items: np.ndarray | None, new_items: float = 0.0
    ) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
        """Yields (n, (scores, rows)) with the best items of the n-th session, for every n in `wanted`, in any order.

        `wanted`: n -> how many of the best items are needed at least. `items` (C,), ascending: the candidates; None: all. `new_items`:
        log-odds added to cold items."""
        length, count = self.model.config.max_prefix, self.model.config.items if items is None else len(items)
        order = sorted(wanted, key=lambda n: len(sessions[n]))  # batches of similar lengths need less padding
        cost = np.cumsum([length * count + ENTRY * int(self.entries[sessions[n][-length:]].sum()) for n in order])
        for _, part in itertools.groupby(zip(cost // SCORES_AT_ONCE, order, strict=True), key=lambda entry: entry[0]):
            numbers = [n for _, n in part]
            rows = torch.as_tensor(pad_prefixes([sessions[n] for n in numbers], length)).long()
            with torch.inference_mode():
                scores = self.model.scores(rows, self.tables, items=None if items is None else torch.as_tensor(items))
                if new_items:
                    scores += new_items * ~(self.model.known if items is None else self.model.known[torch.as_tensor(items)])
                best, places = greatest(scores, max(wanted[n] for n in numbers))
            for line, n in enumerate(numbers):
                yield n, (best[line], places[line] if items is None else items[places[line]])


def greatest(scores: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and places (B, k) of the k greatest of each line of (B, C), equal values in the order of `top_k.first`
    (`topk` takes equal values in any order)."""
    values, places = scores.topk(min(k + 1, scores.shape[1]))
    places, order = places.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    best = places.gather(1, order).numpy()
    if values.shape[1] > k:
        for line in (values[:, k - 1] == values[:, k]).nonzero()[:, 0].tolist():  # only some of the equal values are in
            best[line, :k] = first(scores[line].numpy(), k)
    return values[:, :k].numpy(), best[:, :k]
