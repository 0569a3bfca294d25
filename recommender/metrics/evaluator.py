"""Models and baselines held against the same cases.

A case is every position of a test session from the second on; all items of the catalogue are ranked, cold ones too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.core.config import DataConfig
from pipeline.data.availability import Availability
from pipeline.data.session_log import SessionLog
from pipeline.data.split import Split
from recommender.baselines.counts import Scorer
from recommender.baselines.registry import BASELINES, Model
from recommender.metrics.ranks import summarise_buckets, target_ranks
from recommender.session_model.model import SessionModel
from recommender.session_model.windows import PAD, Windows, prefixes_of

READ_AT_ONCE = 2_000  # events: enough to be worth the calls
SCORES_AT_ONCE = 1_000_000  # numbers of a batch: few enough for a processor's cache, enough to be worth the calls
TOP = 20  # recommendations of a case that are counted
PREFIXES_AT_ONCE = 256  # that baselines are asked for
REFIT_NOTE = "the figures are of models that have seen the training sessions alone; the published one was then trained on all sessions"
BucketMetrics = dict[str, dict[str, float]]  # bucket -> metric -> value


def positions_of(windows: Windows, log: SessionLog) -> tuple[np.ndarray, np.ndarray]:
    """Of every case, in their order: which session of the log it is in, and its target's position there, both (cases,).
    Cases are the last events of their sessions."""
    session = windows.session[np.nonzero(windows.targets != PAD)[0]]
    to_go = np.searchsorted(session, session, "right") - np.arange(len(session))
    return session, np.diff(log.offsets)[session] - to_go


def model_ranks(model: Model, windows: Windows, recommended: np.ndarray | None = None, available: Availability | None = None) -> np.ndarray:
    """The target's rank in every case of the windows, (cases,), in their order, among the items `available` at its time (None: all).
    `recommended` (N,) counts in how many cases each item is among the first `TOP`."""
    model.eval()
    case = windows.targets != PAD
    number = np.cumsum(case).reshape(case.shape) - 1  # of a case
    ranks = np.empty(windows.cases)
    with torch.inference_mode():
        tables: Any = model.tables()

    def rank(which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found, counts = [], np.zeros(len(model.known), np.int64)
        with torch.inference_mode():
            for scores, targets, times in scored(model, tables, windows.take(which)):
                hide_unavailable(scores, targets, times, available)
                found.append(target_ranks(scores, targets))
                if recommended is not None:
                    count_top(scores, counts)
            return torch.cat(found).cpu().numpy(), counts

    batches = list(alike(windows, READ_AT_ONCE))
    with side_by_side(model.known.device) as pool:
        for which, (found, counts) in zip(batches, pool.map(rank, batches), strict=True):
            ranks[number[which][case[which]]] = found
            if recommended is not None:
                recommended += counts
    return ranks


@contextmanager
def side_by_side(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads that rank a batch each. PyTorch's own share out every operation, and wait for each other hundreds of times a batch."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads if device.type == "cpu" else 1, initializer=lambda: torch.set_num_threads(1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what a new thread begins with is what any thread set last


def alike(windows: Windows, most: int) -> Iterator[np.ndarray]:
    """Numbers of windows in batches of one length, so that nothing is padded, and of as many cases each; of at most `most` events
    or one window."""
    lengths, cases = (windows.inputs != PAD).sum(1), (windows.targets != PAD).sum(1)
    for length, case in np.unique(np.stack([lengths, cases], 1), axis=0):
        which = np.flatnonzero((lengths == length) & (cases == case))
        size = max(1, most // max(1, length))
        yield from (which[start : start + size] for start in range(0, len(which), size))


def scored(model: Model, tables: Any, windows: Windows) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Scores (cases, N), or what ranks the same, targets (cases,) and their times (cases,) of windows that are alike, some windows at
    a time."""
    rows, targets = (torch.as_tensor(a, device=model.known.device).long() for a in (windows.inputs, windows.targets))
    times = None if windows.times is None else torch.as_tensor(windows.times, device=model.known.device)
    real = targets != PAD
    size = max(1, SCORES_AT_ONCE // len(model.known) // rows.shape[1])
    parts = [slice(start, start + size) for start in range(0, len(rows), size)]
    if isinstance(model, SessionModel):
        mixture = model.mixture(rows, tables, real)
        scores = (model.masses(mixture.of(part), tables) for part in parts)
    else:
        scores = (model.scores(rows[part], tables, real[part]) for part in parts)
    of_cases = (None if times is None else times[part][real[part]] for part in parts)
    return zip(scores, (targets[part][real[part]] for part in parts), of_cases, strict=True)


def hide_unavailable(scores: Tensor, targets: Tensor, times: Tensor | None, available: Availability | None) -> None:
    """Puts the items that are not available at the times (B,) below all others in scores (B, N); None: those that never are. A target was
    clicked, so it stays."""
    if available is None:
        return
    begin, end = (torch.as_tensor(limit, device=scores.device) for limit in available)
    now = torch.zeros((1, 1), device=scores.device, dtype=torch.long) if times is None else times[:, None]
    of_target = scores.gather(1, targets[:, None])
    scores.masked_fill_((begin > now) | (end <= now), -torch.inf)
    scores.scatter_(1, targets[:, None], of_target)


def baseline_ranks(
    score: Scorer, windows: Windows, recommended: np.ndarray | None = None, available: Availability | None = None
) -> np.ndarray:
    """`model_ranks` of a baseline."""
    prefixes, targets = prefixes_of(windows)
    times = None if windows.times is None else torch.as_tensor(windows.times[windows.targets != PAD])
    found = [np.empty(0)]
    for part in (slice(start, start + PREFIXES_AT_ONCE) for start in range(0, len(targets), PREFIXES_AT_ONCE)):
        if available is not None:
            scores, target = torch.as_tensor(score(prefixes[part])), torch.as_tensor(targets[part]).long()
            hide_unavailable(scores, target, None if times is None else times[part], available)
            found.append(target_ranks(scores, target).numpy())
            if recommended is not None:
                count_top(scores, recommended)
            continue
        found.append(score.ranks(prefixes[part], targets[part]))
        if recommended is not None:
            recommended += np.bincount(score.top(prefixes[part], TOP).flatten(), minlength=len(recommended))
    return np.concatenate(found)


def count_top(scores: torch.Tensor, recommended: np.ndarray) -> None:
    values, top = scores.topk(min(TOP, scores.shape[1]))
    recommended += np.bincount(top[values > -torch.inf].cpu().numpy(), minlength=len(recommended))  # of few available items not all


def buckets_of(windows: Windows, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Kinds of cases: by whether the target was seen in training, whether it is in the prefix already, how long the prefix is,
    and how popular the target: `head`, `middle` and `tail` are the items with a third each of the training events."""
    prefixes, targets = prefixes_of(windows)
    warm = counts[targets] > 0
    repeat = (prefixes == targets[:, None]).any(1)
    length = (prefixes != PAD).sum(1)
    order = np.argsort(-counts, kind="stable")
    third = np.empty(len(counts), np.int64)
    before = counts[order].cumsum() - counts[order]  # events of the more popular items
    third[order] = np.minimum(3 * before // max(counts.sum(), 1), 2)
    return {
        **{"warm": warm, "cold": ~warm, "repeat": repeat, "novel": ~repeat},
        **{"prefix 1": length == 1, "prefix 2": length == 2, "prefix 3-4": (length == 3) | (length == 4), "prefix 5+": length >= 5},
        **{name: warm & (third[targets] == n) for n, name in enumerate(("head", "middle", "tail"))},
    }


def duplicates(test: SessionLog, train: SessionLog) -> tuple[np.ndarray, np.ndarray]:
    """Of each test session: whether a training session has exactly its items, and the first test session that has, both (S,)."""
    trained = {train.session(i).tobytes() for i in range(len(train))}
    own = [test.session(i).tobytes() for i in range(len(test))]
    first: dict[bytes, int] = {}
    group = np.array([first.setdefault(items, n) for n, items in enumerate(own)], np.int64)
    return np.array([items in trained for items in own], bool), group


def average(runs: Sequence[BucketMetrics]) -> tuple[BucketMetrics, BucketMetrics]:
    """Mean and standard deviation over the runs of one model: seeds, or windows of time, some of which may have no case of a bucket."""
    mean: BucketMetrics = {}
    spread: BucketMetrics = {}
    for bucket in runs[0]:
        names = dict.fromkeys(name for run in runs for name in run[bucket])
        values = {name: [run[bucket][name] for run in runs if name in run[bucket]] for name in names}
        mean[bucket] = {name: float(np.mean(v)) for name, v in values.items()}
        spread[bucket] = {name: float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for name, v in values.items()}
    return mean, spread


def read_ceiling(data: Path, settings: DataConfig) -> BucketMetrics | None:
    """What the true law of the sample shop scores; None without the file, or where it is of another split."""
    try:
        ceiling = json.loads((data / "ceiling.json").read_text(encoding="utf-8"))
        same = settings.protocol == "time" and all(ceiling[key] == getattr(settings, key) for key in ("valid", "test", "max_prefix"))
        return dict(ceiling["metrics"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def collect_results(
    split: Split,
    counts: np.ndarray,
    test: Windows,
    buckets: Mapping[str, np.ndarray],
    runs: Mapping[str, list[BucketMetrics]],
    ceiling: BucketMetrics | None,
    available: Availability | None,
) -> dict[str, Any]:
    """Baselines, the trained models' `runs` and the ceiling, as metrics.json holds them. `test` are the windows of split.test."""
    train, items = split.train, len(counts)
    scorers = {name: build(train.rows, train.offsets, items) for name, build in BASELINES.items()}
    ranks = {name: baseline_ranks(score, test, available=available) for name, score in scorers.items()}
    found = {name: [summarise_buckets(each, buckets)] for name, each in ranks.items()} | dict(runs)
    results = {name: dict(zip(("mean", "std"), average(each), strict=True)) | {"seeds": len(each)} for name, each in found.items()}
    if ceiling is not None:
        results["ceiling"] = {"mean": ceiling, "std": {}, "seeds": 1}
    return {"facts": facts_of(split, counts, *duplicates(split.test, train)), "results": results}


def facts_of(split: Split, counts: np.ndarray, trained: np.ndarray, group: np.ndarray) -> dict[str, Any]:
    """`trained` and `group` as `duplicates` finds them."""
    return {
        "train_sessions": len(split.train),
        "valid_sessions": len(split.valid),
        "test_sessions": len(split.test),
        "one_event_sessions_dropped": split.train.dropped,
        "test_sessions_also_in_training": int(trained.sum()),
        "test_sessions_repeated": len(group) - len(np.unique(group)),
        "items": len(counts),
        "cold_items": int((counts == 0).sum()),
    }


def cases_table(test: Windows, log: SessionLog, item_ids: Sequence[str], ranks: Mapping[str, np.ndarray]) -> pa.Table:
    """Every case of `log`: session_id, position and item_id of the target, and its rank in each of `ranks`, (cases,)."""
    session, position = positions_of(test, log)
    columns = {
        "session_id": [log.session_ids[number] for number in session],
        "position": pa.array(position, pa.int32()),
        "item_id": [item_ids[row] for row in log.rows[log.offsets[session] + position]],
    }
    return pa.table(columns | {name: pa.array(of, pa.float64()) for name, of in ranks.items()})
