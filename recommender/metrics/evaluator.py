"""Ranks the targets of test cases by models and baselines.

A case is a position of a test session, from the second on; all items of the catalogue are ranked, cold ones too.
"""

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
from pipeline.core.files import read_json
from pipeline.data.availability import Availability
from pipeline.data.session_log import SessionLog
from pipeline.data.split import Split
from recommender.baselines.counts import Scorer
from recommender.baselines.registry import BASELINES, Model, build_baseline
from recommender.metrics.ranks import summarise_buckets, target_ranks
from recommender.session_model.model import SessionModel
from recommender.session_model.windows import PAD, Windows, prefixes_of

READ_AT_ONCE = 2_000  # events in a batch: amortises the overhead of PyTorch calls
SCORES_AT_ONCE = 1_000_000  # scores in a batch: fits into the cache of a CPU, and amortises the overhead of PyTorch calls
TOP = 20  # recommendations of each case, for coverage and Gini
PREFIXES_AT_ONCE = 256  # in a batch of a baseline
REFIT_NOTE = "the figures are of models trained on the training sessions alone; the published model was then trained on all sessions"
BucketMetrics = dict[str, dict[str, float]]  # bucket -> metric -> value
Limits = tuple[Tensor, Tensor]  # begin and end of the availability of each item, (N,) both, Unix seconds


def positions_of(windows: Windows, log: SessionLog) -> tuple[np.ndarray, np.ndarray]:
    """Returns for every case, in order, the number of its session in the log and the position of its target there, both (cases,).

    The cases of a session must be its last events."""
    session = windows.session[np.nonzero(windows.targets != PAD)[0]]
    remaining = np.searchsorted(session, session, "right") - np.arange(len(session))
    return session, np.diff(log.offsets)[session] - remaining


def model_ranks(model: Model, windows: Windows, recommended: np.ndarray | None = None, available: Availability | None = None) -> np.ndarray:
    """Returns (cases,) the rank of the target of every case of the windows, in order, among the items `available` then (None: all).

    `recommended` (N,): adds to each item the number of cases in which it is among the first `TOP`."""
    model.eval()
    case = windows.targets != PAD
    number = np.cumsum(case).reshape(case.shape) - 1  # of each case
    ranks, limits = np.empty(windows.cases), limits_of(available, model.known.device)
    with torch.inference_mode():
        tables: Any = model.tables()

    def rank(which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch_ranks, counts = [], np.zeros(len(model.known), np.int64)
        with torch.inference_mode():
            for scores, targets, times in scored(model, tables, windows.take(which)):
                hide_unavailable(scores, targets, times, limits)
                batch_ranks.append(target_ranks(scores, targets))
                if recommended is not None:
                    count_top(scores, counts)
            return torch.cat(batch_ranks).cpu().numpy(), counts

    batches = list(equal_length_batches(windows, READ_AT_ONCE))
    with side_by_side(model.known.device) as pool:
        for which, (batch_ranks, counts) in zip(batches, pool.map(rank, batches), strict=True):
            ranks[number[which][case[which]]] = batch_ranks
            if recommended is not None:
                recommended += counts
    return ranks


@contextmanager
def side_by_side(device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Opens a pool of threads that each rank a batch. PyTorch's own threads split every operation, and would synchronise hundreds of
    times in a batch."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads if device.type == "cpu" else 1, initializer=lambda: torch.set_num_threads(1))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a new thread starts with the number that any thread set last


def equal_length_batches(windows: Windows, most: int) -> Iterator[np.ndarray]:
    """Yields batches of window numbers; all windows of a batch have the same length, so that nothing is padded, and the same number of
    cases. A batch has at most `most` events, or one window."""
    lengths, cases = (windows.inputs != PAD).sum(1), (windows.targets != PAD).sum(1)
    for length, case in np.unique(np.stack([lengths, cases], 1), axis=0):
        which = np.flatnonzero((lengths == length) & (cases == case))
        size = max(1, most // max(1, length))
        yield from (which[start : start + size] for start in range(0, len(which), size))


def scored(model: Model, tables: Any, windows: Windows) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yields scores (cases, N), up to a monotone function, targets (cases,) and their times (cases,) of windows of equal length, some
    windows at a time."""
    rows, targets = (torch.as_tensor(array, device=model.known.device).long() for array in (windows.inputs, windows.targets))
    times = None if windows.times is None else torch.as_tensor(windows.times, device=model.known.device)
    real = targets != PAD
    size = max(1, SCORES_AT_ONCE // len(model.known) // rows.shape[1])
    parts = [slice(start, start + size) for start in range(0, len(rows), size)]
    if isinstance(model, SessionModel):
        mixture = model.mixture(rows, tables, real)
        scores = (model.masses(mixture.select(part), tables) for part in parts)
    else:
        scores = (model.scores(rows[part], tables, real[part]) for part in parts)
    case_times = (None if times is None else times[part][real[part]] for part in parts)
    return zip(scores, (targets[part][real[part]] for part in parts), case_times, strict=True)


def limits_of(available: Availability | None, device: torch.device) -> Limits | None:
    """Returns the availability as tensors; None: all items are always available."""
    if available is None:
        return None
    return torch.as_tensor(available.begin, device=device), torch.as_tensor(available.end, device=device)


def hide_unavailable(scores: Tensor, targets: Tensor, times: Tensor | None, limits: Limits | None) -> None:
    """Sets the scores (B, N) of items that are not available at the times (B,) to -inf; times None: of items that never are.

    The scores of targets (B,) stay, as a target was clicked."""
    if limits is None:
        return
    begin, end = limits
    now = torch.zeros((1, 1), device=scores.device, dtype=torch.long) if times is None else times[:, None]
    target_scores = scores.gather(1, targets[:, None])
    scores.masked_fill_((begin > now) | (end <= now), -torch.inf)
    scores.scatter_(1, targets[:, None], target_scores)


def baseline_ranks(
    score: Scorer, windows: Windows, recommended: np.ndarray | None = None, available: Availability | None = None
) -> np.ndarray:
    """Returns the ranks of a baseline; parameters and result as in `model_ranks`."""
    prefixes, targets = prefixes_of(windows)
    times = None if windows.times is None else torch.as_tensor(windows.times[windows.targets != PAD])
    ranks, limits = [np.empty(0)], limits_of(available, torch.device("cpu"))
    for part in (slice(start, start + PREFIXES_AT_ONCE) for start in range(0, len(targets), PREFIXES_AT_ONCE)):
        if limits is not None:
            scores, target = torch.as_tensor(score(prefixes[part])), torch.as_tensor(targets[part]).long()
            hide_unavailable(scores, target, None if times is None else times[part], limits)
            ranks.append(target_ranks(scores, target).numpy())
            if recommended is not None:
                count_top(scores, recommended)
            continue
        ranks.append(score.ranks(prefixes[part], targets[part]))
        if recommended is not None:
            recommended += np.bincount(score.top(prefixes[part], TOP).flatten(), minlength=len(recommended))
    return np.concatenate(ranks)


def count_top(scores: torch.Tensor, recommended: np.ndarray) -> None:
    """Adds to `recommended` (N,) the items that are among the first `TOP` of each line of scores (B, N)."""
    values, top = scores.topk(min(TOP, scores.shape[1]))
    recommended += np.bincount(top[values > -torch.inf].cpu().numpy(), minlength=len(recommended))  # fewer than TOP may be available


def buckets_of(windows: Windows, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns bucket -> (cases,) bool: by whether the target is warm (has training events) or cold, whether it repeats an item of the
    prefix, by length of the prefix, and by popularity of the target: `head`, `middle` and `tail` have a third of the training events
    each. `counts` (N,): training events of the items."""
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
    """Returns for each test session whether a training session has exactly its items, and the number of the first test session that has
    them, both (S,)."""
    train_sessions = {train.session(i).tobytes() for i in range(len(train))}
    test_sessions = [test.session(i).tobytes() for i in range(len(test))]
    first: dict[bytes, int] = {}
    group = np.array([first.setdefault(items, n) for n, items in enumerate(test_sessions)], np.int64)
    return np.array([items in train_sessions for items in test_sessions], bool), group


def average(runs: Sequence[BucketMetrics]) -> tuple[BucketMetrics, BucketMetrics]:
    """Returns mean and standard deviation over the runs of one model: seeds, or windows, some of which may lack a bucket."""
    mean: BucketMetrics = {}
    spread: BucketMetrics = {}
    for bucket in runs[0]:
        names = dict.fromkeys(name for run in runs for name in run[bucket])
        values = {name: [run[bucket][name] for run in runs if name in run[bucket]] for name in names}
        mean[bucket] = {name: float(np.mean(v)) for name, v in values.items()}
        spread[bucket] = {name: float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for name, v in values.items()}
    return mean, spread


def read_ceiling(data: Path, settings: DataConfig) -> BucketMetrics | None:
    """Reads the metrics of the true distribution of the sample shop; None without the file, or if it is of another split."""
    try:
        ceiling = read_json(data / "ceiling.json")
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
    settings: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """Returns the content of metrics.json: baselines, the `runs` of the trained models, and the ceiling. `test`: windows of split.test;
    `settings`: of the baselines, by name."""
    train, items = split.train, len(counts)
    ranks = {name: baseline_ranks(build_baseline(name, train, items, settings[name]), test, available=available) for name in BASELINES}
    metrics = {name: [summarise_buckets(by_case, buckets)] for name, by_case in ranks.items()} | dict(runs)
    results = {name: dict(zip(("mean", "std"), average(seeds), strict=True)) | {"seeds": len(seeds)} for name, seeds in metrics.items()}
    if ceiling is not None:
        results["ceiling"] = {"mean": ceiling, "std": {}, "seeds": 1}
    return {"facts": facts_of(split, counts, *duplicates(split.test, train)), "results": results}


def facts_of(split: Split, counts: np.ndarray, trained: np.ndarray, group: np.ndarray) -> dict[str, Any]:
    """Returns the facts about the data for metrics.json. `trained` and `group` (S,): the result of `duplicates`."""
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
    """Returns a table of every case of `log`: session_id, position and item_id of the target, and its rank in each of `ranks`, (cases,)."""
    session, position = positions_of(test, log)
    columns = {
        "session_id": [log.session_ids[number] for number in session],
        "position": pa.array(position, pa.int32()),
        "item_id": [item_ids[row] for row in log.rows[log.offsets[session] + position]],
    }
    return pa.table(columns | {name: pa.array(by_case, pa.float64()) for name, by_case in ranks.items()})
