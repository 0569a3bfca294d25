"""Measures the recall and the latency of an index: when it is built, to choose its search effort, and for `tpad index --check`."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from recommender.retrieval.index import ItemIndex, factory_of
from recommender.session_model.numpy_model import NumpySessionModel, SessionState

EFFORTS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # search efforts to choose from when the index is built
WANTED = 0.99  # recall; the largest effort is chosen if none reaches it
WANTED_QUANTIZED = 0.95  # ... of an index with a product quantizer, which finds the last few per cent at several times the cost only
CHECK_K = 20  # recall is measured on the first 20 items
SCORED_AT_ONCE = 200_000  # items
CHECK_NUMBERS = 2e7  # scores that a measurement computes: bounds the number of sessions


def exact_kth_scores(model: NumpySessionModel, sessions: Sequence[SessionState]) -> list[float]:
    """Computes for each session the score of the `CHECK_K`-th best item of the whole catalogue."""
    best: list[np.ndarray] = [np.empty(0, np.float32)] * len(sessions)
    for begin in range(0, len(model.known), SCORED_AT_ONCE):
        items = np.arange(begin, min(begin + SCORED_AT_ONCE, len(model.known)))
        best = [np.sort(np.append(scores, model.scores(state, items)))[-CHECK_K:] for state, scores in zip(sessions, best, strict=True)]
    return [float(scores[0]) for scores in best]


def measure(index: ItemIndex, sessions: Sequence[SessionState], kth_scores: Sequence[float]) -> tuple[float, np.ndarray]:
    """Measures recall@`CHECK_K` against the exact search (ties count as hits) and the milliseconds of each session."""
    k, hits, times = min(CHECK_K, len(index.model.known)), 0, []
    for state, kth_score in zip(sessions, kth_scores, strict=True):
        began = time.perf_counter()
        scores = index.top(state, k)[0]
        times.append((time.perf_counter() - began) * 1000)
        hits += int((scores >= kth_score - 1e-4).sum())
    return hits / (k * len(sessions)), np.array(times)


def encode_sessions(model: NumpySessionModel, sessions: Sequence[Sequence[int]]) -> list[SessionState]:
    """Encodes the first of the sessions, fewer of them the more items there are to score; empty ones are left out."""
    most = max(10, int(CHECK_NUMBERS / len(model.known)))
    return [model.encode(list(session)) for session in sessions[:most] if session]


def describe(index: ItemIndex, setting: str, sessions: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Chooses the smallest search effort that reaches a recall of `WANTED`, sets it, and returns the manifest entry of the index."""
    facts: dict[str, Any] = {"setting": setting, "factory": factory_of(setting, len(index.model.known)), "exact": index.exact}
    if not index.exact:
        states = encode_sessions(index.model, sessions)
        kth_scores = exact_kth_scores(index.model, states)
        for effort in EFFORTS:
            index.spend(effort)
            facts |= {f"recall@{CHECK_K}": measure(index, states, kth_scores)[0], "sessions": len(states), "effort": effort}
            if facts[f"recall@{CHECK_K}"] >= (WANTED_QUANTIZED if "PQ" in facts["factory"] else WANTED):
                break
    return facts


def check(index: ItemIndex, sessions: Sequence[Sequence[int]], facts: dict[str, Any]) -> Iterator[str]:
    """Compares the published index with the exact search on this machine, and yields the lines of `tpad index --check`."""
    states = encode_sessions(index.model, sessions)
    began = time.perf_counter()
    kth_scores = exact_kth_scores(index.model, states)
    exact_ms = (time.perf_counter() - began) * 1000 / len(states)
    recall, times = measure(index, states, kth_scores)
    yield f"{facts['factory']} over {len(index.model.known)} items, {len(states)} test sessions"
    when_built = "" if index.exact else f" (when it was built: {facts[f'recall@{CHECK_K}']:.4f})"
    yield f"recall@{CHECK_K} against exact search: {recall:.4f}{when_built}"
    yield f"a search: p50 {np.percentile(times, 50):.2f} ms, p95 {np.percentile(times, 95):.2f} ms; all items scored: {exact_ms:.2f} ms"
