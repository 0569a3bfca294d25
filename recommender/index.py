"""The FAISS index over the item vectors, and the exact top-k of the session model through it.

An item's entry is its vectors and priors of both channels side by side, so one flat inner-product index serves every
query of a session. The model's score is a sum over queries, so the top-k of the sum is found as follows: take the best M
of every query, score those exactly, and stop when the k-th best of them beats all that an item outside every list could
score; else take a larger M. This is the only place that imports faiss, and where its threads are set.
"""

from pathlib import Path

import faiss  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from recommender.model import NEVER, SessionModel, Tables
from recommender.sessions import PAD

faiss.omp_set_num_threads(torch.get_num_threads())

FIRST_LIST = 128  # entries taken of every query at first
GROWTH = 8


def build_index(tables: Tables) -> faiss.Index:
    """A flat index over (N, sum of the channels' D + 1)."""
    entries = torch.cat([torch.cat([v, tables.priors[name][:, None]], 1) for name, v in tables.vectors.items()], 1)
    index = faiss.IndexFlatIP(entries.shape[1])
    index.add(np.ascontiguousarray(entries.detach().float().cpu().numpy()))
    return index


def save_index(index: faiss.Index, path: Path) -> None:
    path.write_bytes(faiss.serialize_index(index).tobytes())


def load_index(path: Path) -> faiss.Index:
    return faiss.deserialize_index(np.frombuffer(path.read_bytes(), dtype=np.uint8))


def top_items(index: faiss.Index, model: SessionModel, tables: Tables, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best items of one prefix, rows (1, L) without padding: their scores (k,) and rows (k,)."""
    reading = model.read(rows, tables)
    queries, weights = _queries(reading.queries, reading.weights, tables)
    own = torch.cat([rows[0][rows[0] != PAD], model.follower_rows(rows[0])])
    popular = tables.priors["popular"] + reading.popular
    size = min(max(FIRST_LIST, 2 * k), index.ntotal)
    while True:
        similarity, found = (
            index.search(queries.detach().numpy(), size) if len(queries) else (np.empty((0, size)), np.empty((0, size), np.int64))
        )
        best_popular = popular.topk(size)
        candidates = torch.cat([own, torch.as_tensor(found).flatten(), best_popular.indices]).unique()  # type: ignore[no-untyped-call]
        scores = model.scores(rows, tables, items=candidates)[0]
        best = scores.topk(min(k, len(candidates)))
        elsewhere = torch.cat([weights + torch.as_tensor(similarity)[:, -1], best_popular.values[-1:]]).logsumexp(0)
        if size == index.ntotal or (len(best.values) == k and best.values[-1] >= elsewhere):
            return best.values, candidates[best.indices]
        size = min(size * GROWTH, index.ntotal)


def _queries(queries: dict[str, Tensor], weights: dict[str, Tensor], tables: Tables) -> tuple[Tensor, Tensor]:
    """The channels' queries of one prefix in the layout of the entries, (Q, entry), and their log-weights (Q,)."""
    parts, logs = [], []
    width = [vectors.shape[1] + 1 for vectors in tables.vectors.values()]
    for number, (name, query) in enumerate(queries.items()):
        weight = weights[name][0, -1]
        open_ = weight > NEVER / 2
        padded = torch.zeros(int(open_.sum()), sum(width))
        start = sum(width[:number])
        padded[:, start : start + width[number] - 1] = query[0][open_]
        padded[:, start + width[number] - 1] = 1.0
        parts.append(padded)
        logs.append(weight[open_])
    return torch.cat(parts), torch.cat(logs)
