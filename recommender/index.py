"""FAISS over the item vectors, and the top-k of the session model through it.

The model's score is a sum over queries: one for each channel and item of the session. So every channel has an index of its
own, over [v ; prior / scale] of its items; the inner product with [scale * q ; scale] is what a query gives an item. The
best M of every query, the items counted beside those of the session, these themselves and the popular ones are scored exactly by the model.

With a flat index the answer is exact: it stops when the k-th best of the candidates beats all that an item outside every
list could score, else it takes a larger M. Any other index (HNSW, IVF, ...) finds most of the candidates in a fraction of
the time; the recall of the answer against the exact one is measured when it is built. A GPU builds what faiss-gpu can (not
HNSW), and the index goes to the disk in its CPU form; no test of this project has had one.

This is where faiss is imported and its threads are set.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from pipeline.errors import USAGE, UserError
from pipeline.progress import Steps
from recommender.model import Reading, SessionModel, Tables
from recommender.pairs import NEVER
from recommender.sessions import pad_prefixes

FLAT_ITEMS = 50_000  # auto: up to here flat, which is exact ...
HNSW_ITEMS = 500_000  # ... up to here HNSW, and above IVF, which is built faster
EFFORT = {"efSearch": 80, "nprobe": 16}  # what HNSW and IVF spend on a query
FIRST_LIST = 80  # entries taken of every query at first
GROWTH = 8
ADD_AT_ONCE = 20_000
CHECK_K = 20  # the recall is that of the first so many
CHECK_NUMBERS = 2e7  # scores computed to measure it: bounds the sessions asked


def factory_of(setting: str, items: int) -> str:
    """`sbr.index` as FAISS's factory reads it."""
    if setting == "auto":
        setting = "flat" if items <= FLAT_ITEMS else "hnsw" if items <= HNSW_ITEMS else "ivf"
    lists = 2 ** int(math.log2(max(1.0, min(4 * math.sqrt(items), items / 40))))  # 40: of fewer items a list, FAISS warns
    return {"flat": "Flat", "hnsw": "HNSW32,Flat", "ivf": f"IVF{lists},Flat"}.get(setting, setting)


def empty_index(setting: str, items: int, dim: int) -> faiss.Index:
    try:
        return faiss.index_factory(dim, factory_of(setting, items), faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise _refused(setting, error) from None


def _refused(setting: str, error: RuntimeError) -> UserError:
    reason = str(error).splitlines()[0].rpartition("Error: ")[2][:200]
    way_out = "give auto, flat, hnsw, ivf or another factory string"
    return UserError(f"FAISS cannot build this index: {reason} (sbr.index {setting!r}); {way_out}", USAGE)


def build_indexes(model: SessionModel, tables: Tables, setting: str) -> dict[str, faiss.Index]:
    """An index for each channel, over its own items."""
    faiss.omp_set_num_threads(torch.get_num_threads())
    indexes = {}
    for name in tables.vectors:
        rows = _rows(tables, name)
        entries = torch.cat([tables.vectors[name], (tables.priors[name] / _scale(model, name))[:, None]], 1)[rows]
        vectors = np.ascontiguousarray(entries.detach().float().cpu().numpy())
        index = empty_index(setting, len(vectors), vectors.shape[1])
        on_gpu = gpus() > 0 and "HNSW" not in factory_of(setting, len(vectors))
        try:
            index = faiss.index_cpu_to_all_gpus(index) if on_gpu else index
            index.train(vectors)
            with Steps(f"index of {name}", len(vectors), show=len(vectors) > ADD_AT_ONCE) as shown:
                for start in range(0, len(vectors), ADD_AT_ONCE):
                    index.add(vectors[start : start + ADD_AT_ONCE])
                    shown.advance(by=len(vectors[start : start + ADD_AT_ONCE]))
        except RuntimeError as error:  # too few items for so many lists, ...
            raise _refused(setting, error) from None
        indexes[name] = faiss.index_gpu_to_cpu(index) if on_gpu else index
    return indexes


def gpus() -> int:
    """How many GPUs this build of FAISS can use."""
    return int(faiss.get_num_gpus()) if "GPU" in faiss.get_compile_options() else 0


def save_indexes(indexes: dict[str, faiss.Index], folder: Path) -> None:
    for name, index in indexes.items():
        (folder / f"index-{name}.faiss").write_bytes(faiss.serialize_index(index).tobytes())


def load_indexes(folder: Path) -> dict[str, faiss.Index]:
    files = {path.stem.removeprefix("index-"): path for path in folder.glob("index-*.faiss")}
    return {name: faiss.deserialize_index(np.frombuffer(path.read_bytes(), dtype=np.uint8)) for name, path in files.items()}


def _rows(tables: Tables, channel: str) -> Tensor:
    """The items of a channel's index: those it can offer."""
    return (tables.priors[channel] > NEVER / 2).nonzero()[:, 0]


def _scale(model: SessionModel, channel: str) -> float:
    return float(model.channel(channel).log_scale.exp())


class ItemIndex:
    """The indexes of a model's channels beside its tables. Several threads may ask at once."""

    def __init__(self, indexes: dict[str, faiss.Index], model: SessionModel, tables: Tables) -> None:
        self.model, self.tables, self.indexes = model, tables, indexes
        self.rows = {name: _rows(tables, name) for name in indexes}
        self.popular = tables.priors["popular"].argsort(descending=True, stable=True)
        self.exact = all(isinstance(faiss.downcast_index(index), faiss.IndexFlat) for index in indexes.values())
        self.spend(1.0)

    def spend(self, effort: float) -> None:
        """How much a search may cost, in multiples of the usual; nothing to a flat index, which is always exact."""
        self.first = math.ceil(FIRST_LIST * effort)
        for index in [] if self.exact else self.indexes.values():
            for name, value in EFFORT.items():
                try:
                    faiss.ParameterSpace().set_index_parameter(index, name, math.ceil(value * effort))
                except RuntimeError:  # an index that has no such parameter
                    continue

    def top(self, rows: Tensor, k: int, allowed: Tensor | None = None, reading: Reading | None = None) -> tuple[Tensor, Tensor]:
        """The k best items of one prefix, rows (1, L) without padding, or of the `allowed` (N,) bool: scores (k,) and rows (k,)."""
        # set for each thread that asks, as OpenMP has it; a search of microseconds would wait for threads longer than it takes
        faiss.omp_set_num_threads(torch.get_num_threads() if self.exact else 1)
        count = len(self.popular)
        reading = self.model.read(rows, self.tables) if reading is None else reading
        queries = {}
        for name in self.indexes:
            weight = reading.weights[name][0, -1]
            query = torch.cat([reading.queries[name][0], torch.full((len(weight), 1), _scale(self.model, name))], 1)
            open_ = weight > NEVER / 2
            queries[name] = query[open_].numpy(), weight[open_]
        own = torch.cat([rows[0], self.model.paired(rows[0])])
        size = max(self.first, 2 * k)
        if allowed is not None:
            size = math.ceil(size * count / max(1, int(allowed.sum())))
        while True:
            size = min(size, count)
            found = [own, self.popular[:size]]
            elsewhere = [self.tables.priors["popular"][found[1][-1:]] + reading.popular]  # at most, of what is in no list
            for name, (asked_for, weights) in queries.items():
                if len(asked_for):
                    index = self.indexes[name]
                    near, entries = (torch.as_tensor(array) for array in index.search(asked_for, min(size, index.ntotal)))
                    found.append(self.rows[name][entries[entries >= 0]])
                    elsewhere.append(weights + near[:, -1])
            candidates = torch.cat(found).unique()  # type: ignore[no-untyped-call]
            if allowed is not None:
                candidates = candidates[allowed[candidates]]
            if len(candidates) >= k or size == count:
                best = self.model.scores(rows, self.tables, items=candidates, reading=reading)[0].topk(min(k, len(candidates)))
                if size == count or not self.exact or best.values[-1] >= torch.cat(elsewhere).logsumexp(0):
                    return best.values, candidates[best.indices]
            size *= GROWTH


def exact_worst(index: ItemIndex, sessions: Sequence[Tensor]) -> list[float]:
    """The last score of each session's exact first `CHECK_K`."""
    scores = (index.model.scores(rows, index.tables)[0] for rows in sessions)
    return [float(each.topk(min(CHECK_K, len(each))).values[-1]) for each in scores]


def measure(index: ItemIndex, sessions: Sequence[Tensor], worst: Sequence[float]) -> tuple[float, np.ndarray]:
    """Share of the exact first `CHECK_K` items that the index finds (ties count as found), and the milliseconds of each session."""
    k, hits, times = min(CHECK_K, len(index.popular)), 0, []
    for rows, score in zip(sessions, worst, strict=True):
        began = time.perf_counter()
        found = index.top(rows, k)[0]
        times.append((time.perf_counter() - began) * 1000)
        hits += int((found >= score - 1e-4).sum())
    return hits / (k * len(sessions)), np.array(times)


def asked(index: ItemIndex, sessions: Sequence[Sequence[int]]) -> list[Tensor]:
    """The sessions as prefixes, (1, L) each; the fewer, the more items there are to score."""
    most = max(10, int(CHECK_NUMBERS / len(index.popular)))
    return [torch.as_tensor(pad_prefixes([list(s)], index.model.config.max_prefix)).long() for s in sessions[:most] if s]


def describe(index: ItemIndex, setting: str, sessions: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the manifest says of it."""
    facts: dict[str, Any] = {"setting": setting, "factory": factory_of(setting, len(index.popular)), "exact": index.exact}
    if not index.exact:
        prefixes = asked(index, sessions)
        facts[f"recall@{CHECK_K}"] = measure(index, prefixes, exact_worst(index, prefixes))[0]
        facts["sessions"] = len(prefixes)
    return facts


def check(index: ItemIndex, sessions: Sequence[Sequence[int]], facts: dict[str, Any]) -> Iterator[str]:
    """`tpad index --check`: the published index and the exact search, on this machine, now."""
    with torch.inference_mode():
        prefixes = asked(index, sessions)
        began = time.perf_counter()
        worst = exact_worst(index, prefixes)
        each = (time.perf_counter() - began) * 1000 / len(prefixes)
        found, times = measure(index, prefixes, worst)
    yield f"{facts['factory']} over {len(index.popular)} items, {len(prefixes)} test sessions"
    when_built = "" if index.exact else f" (when it was built: {facts[f'recall@{CHECK_K}']:.4f})"
    yield f"recall@{CHECK_K} against exact search: {found:.4f}{when_built}"
    yield f"a search: p50 {np.percentile(times, 50):.2f} ms, p95 {np.percentile(times, 95):.2f} ms; all items scored: {each:.2f} ms"
