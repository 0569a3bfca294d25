"""How exact an index is and what a search costs: measured when it is built, and by `tpad index --check`."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from recommender.retrieval.index import ItemIndex, factory_of
from recommender.session_model.numpy_model import Ranker, Read

EFFORTS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # one of these is chosen when the index is built
WANTED = 0.99  # recall; where no effort reaches it, the greatest is taken
CHECK_K = 20  # the recall is that of the first so many
CHECK_NUMBERS = 2e7  # scores computed to measure it: bounds the sessions asked


def exact_worst(ranker: Ranker, sessions: Sequence[Read]) -> list[float]:
    """The last score of each session's exact first `CHECK_K`."""
    items = np.arange(len(ranker.known))
    return [float(np.sort(ranker.scores(read, items))[-CHECK_K:][0]) for read in sessions]


def measure(index: ItemIndex, sessions: Sequence[Read], worst: Sequence[float]) -> tuple[float, np.ndarray]:
    """Share of the exact first `CHECK_K` items that the index finds (ties count as found), and the milliseconds of each session."""
    k, hits, times = min(CHECK_K, len(index.ranker.known)), 0, []
    for read, score in zip(sessions, worst, strict=True):
        began = time.perf_counter()
        found = index.top(read, k)[0]
        times.append((time.perf_counter() - began) * 1000)
        hits += int((found >= score - 1e-4).sum())
    return hits / (k * len(sessions)), np.array(times)


def asked(ranker: Ranker, sessions: Sequence[Sequence[int]]) -> list[Read]:
    """What the sessions say; the fewer, the more items there are to score."""
    most = max(10, int(CHECK_NUMBERS / len(ranker.known)))
    return [ranker.read(list(session)) for session in sessions[:most] if session]


def describe(index: ItemIndex, setting: str, sessions: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the manifest says of it: how exact it is, and, where it is not, by which effort of a search. That is chosen here."""
    facts: dict[str, Any] = {"setting": setting, "factory": factory_of(setting, len(index.ranker.known)), "exact": index.exact}
    if not index.exact:
        read = asked(index.ranker, sessions)
        worst = exact_worst(index.ranker, read)
        for effort in EFFORTS:
            index.spend(effort)
            facts |= {f"recall@{CHECK_K}": measure(index, read, worst)[0], "sessions": len(read), "effort": effort}
            if facts[f"recall@{CHECK_K}"] >= WANTED:
                break
    return facts


def check(index: ItemIndex, sessions: Sequence[Sequence[int]], facts: dict[str, Any]) -> Iterator[str]:
    """`tpad index --check`: the published index and the exact search, on this machine, now."""
    read = asked(index.ranker, sessions)
    began = time.perf_counter()
    worst = exact_worst(index.ranker, read)
    each = (time.perf_counter() - began) * 1000 / len(read)
    found, times = measure(index, read, worst)
    yield f"{facts['factory']} over {len(index.ranker.known)} items, {len(read)} test sessions"
    when_built = "" if index.exact else f" (when it was built: {facts[f'recall@{CHECK_K}']:.4f})"
    yield f"recall@{CHECK_K} against exact search: {found:.4f}{when_built}"
    yield f"a search: p50 {np.percentile(times, 50):.2f} ms, p95 {np.percentile(times, 95):.2f} ms; all items scored: {each:.2f} ms"
