"""Evaluates the models over N cut-off times inside the log, and the spread of their figures: `tpad evaluate --windows N`.

The figures of one split can be good by chance. The held-out share of the log, `data.valid` + `data.test`, is divided into N + 1
stretches of equal length. Window n trains on all sessions before stretch n, chooses the epoch on stretch n and is tested on stretch
n + 1. No window trains on fewer sessions than the ordinary split, so embeddings that were distilled for that split have seen no
validation or test session of any window.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from pipeline.core.artifact import Version, decoding, published, stage
from pipeline.core.config import Config
from pipeline.core.errors import USAGE, UserError
from pipeline.core.files import canonical_json, read_sealed, remove, write_sealed
from recommender.baselines.registry import BASELINES, build_baseline
from recommender.experiments.evaluate import chosen_reference, clear, open_inputs, single_process
from recommender.experiments.evaluation_report import MAIN, TESTED, row_of
from recommender.metrics.evaluator import BucketMetrics, average, baseline_ranks, buckets_of, model_ranks
from recommender.metrics.ranks import summarise_buckets
from recommender.metrics.results_table import ROWS, Figure, table
from recommender.session_model.windows import Windows
from recommender.training.dataset import TrainingData, load_training_data, model_fingerprint
from recommender.training.search import baseline_fingerprint, baseline_settings, settings_for
from recommender.training.trainer import alone, train_model


def evaluate_windows(
    config: Config, run: Path, data: Path, count: int, names: Sequence[str] | None, against: str | None, fresh: bool = False
) -> tuple[Version, str, str]:
    """Evaluates the models `names` (None: all that can be evaluated) over `count` windows; parameters and result as in `evaluate`.

    Resumable: the figures of a model in a window are stored. Raises `UserError`."""
    if config.data.protocol != "time":
        raise UserError(f"--windows splits the log by time (data.protocol = {config.data.protocol}); set data.protocol = time", USAGE)
    inputs, neural, left_out = open_inputs(config, run, data, names)
    config = config.model_copy(update={"sbr": config.sbr.model_copy(update={"models": neural or ["ID-only"]})})
    baselines = [name for name in BASELINES if names is None or name in names]
    reference = chosen_reference(against, [*baselines, *neural])
    seeds = range(config.seed, config.seed + config.sbr.seeds)
    settings = settings_for(neural, config, inputs, run)
    of_counts = baseline_settings(baselines, config, inputs, run)
    prints = [inputs.fingerprint, *(model_fingerprint(name, seed, settings[name], inputs) for name in neural for seed in seeds)]
    prints += [baseline_fingerprint(name, of_counts[name], inputs) for name in baselines]
    fingerprint = hashlib.sha256(canonical_json([count, prints, reference])).hexdigest()
    target = run / "evaluation" / f"windows-{count}"
    current = published(target, "evaluation")
    if current is not None and current.manifest.get("fingerprint") == fingerprint and not fresh:
        with decoding(current.path, "run `tpad evaluate --windows --fresh`"):
            return current, (current.path / "report.md").read_text(encoding="utf-8"), left_out
    accelerator, work = single_process(), run / "evaluation-train" / f"windows-{count}"
    by_model: dict[str, list[BucketMetrics]] = {name: [] for name in [*baselines, *neural]}  # for each window the mean over the seeds
    facts: list[dict[str, int]] = []
    with alone(work, accelerator):
        if fresh:
            clear(work)
        for number in range(count):
            window = load_training_data(config, run, data, window=(number, count))
            facts.append({f"{part}_sessions": len(getattr(window.split, part)) for part in ("train", "valid", "test")})
            windows = window.windows(config.data.max_prefix)
            for name in baselines:
                by_model[name].append(figures_of_baseline(name, of_counts[name], window, windows[2]))
            for name in neural:
                runs = [figures_of_model(name, seed, settings[name], window, windows, accelerator, work / str(number)) for seed in seeds]
                by_model[name].append(average(runs)[0])
    by_model = dict(sorted(by_model.items(), key=lambda entry: ROWS.index(entry[0])))
    report = markdown(by_model, facts, len(seeds), reference, left_out)
    metrics = {
        "windows": facts,
        "seeds": list(seeds),
        "against": reference,
        "left_out": left_out,
        "results": {name: dict(zip(("mean", "std"), average(runs), strict=True)) for name, runs in by_model.items()},
        "by_window": by_model,
    }
    with stage(target, "evaluation") as staging:
        (staging.path / "report.md").write_text(report, encoding="utf-8")
        (staging.path / "metrics.json").write_bytes(canonical_json(metrics))
        return staging.publish({"fingerprint": fingerprint, "protocol": f"windows-{count}"}), report, left_out


def figures_of_baseline(name: str, settings: Mapping[str, float], inputs: TrainingData, test: Windows) -> BucketMetrics:
    """Returns the metrics of a baseline in the window `inputs`, on its `test`."""
    scorer = build_baseline(name, inputs.split.train, len(inputs.counts), settings)
    return summarise_buckets(baseline_ranks(scorer, test, available=inputs.available), buckets_of(test, inputs.counts))


def figures_of_model(
    name: str,
    seed: int,
    config: Config,
    inputs: TrainingData,
    windows: tuple[Windows, Windows, Windows],
    accelerator: Accelerator,
    work: Path,
) -> BucketMetrics:
    """Trains a model on the window `inputs`, packed as `windows`, and returns its test metrics, or returns those stored in `work`."""
    path, fingerprint = work / f"{name}-{seed}.json", model_fingerprint(name, seed, config, inputs)
    try:
        stored = read_sealed(path)
        if stored["fingerprint"] == fingerprint:
            return dict(stored["metrics"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    model = train_model(name, seed, config, inputs, windows[:2], accelerator, work, fresh=False).model
    metrics = summarise_buckets(model_ranks(model, windows[2], available=inputs.available), buckets_of(windows[2], inputs.counts))
    write_sealed(path, {"fingerprint": fingerprint, "metrics": metrics})
    remove(work / "checkpoints" / f"{name}-{seed}")
    return metrics


def markdown(
    by_model: dict[str, list[BucketMetrics]], facts: list[dict[str, Any]], seeds: int, reference: str | None, left_out: str
) -> str:
    """Returns the report."""
    lines = [f"# Evaluation over {len(facts)} windows of time", ""]
    lines += [
        f"- window {n}: {window['train_sessions']} training, {window['valid_sessions']} validation, {window['test_sessions']} test sessions"
        for n, window in enumerate(facts, 1)
    ]
    if left_out:
        lines += ["", f"Left out: {left_out}."]
    rows = {name: row_of(runs) for name, runs in by_model.items()}
    over = f"Means over {seeds} seeds of the trained models" if seeds > 1 else "One seed of the trained models"
    lines += ["", "## All cases", "", f"Mean ± standard deviation over the windows. {over}.", ""]
    lines += table(rows, {metric: metric for metric in MAIN})
    for metric in TESTED:
        lines += ["", f"## {metric} by window", ""]
        single = {name: {str(n): Figure([value]) for n, value in enumerate(row[metric].values, 1)} for name, row in rows.items()}
        lines += table(single, {str(n): f"window {n}" for n in range(1, len(facts) + 1)})
    if reference is not None:
        lines += [
            "",
            f"## Differences to {reference}",
            "",
            "Mean over the windows ± its standard error, and the number of windows in which it is above 0.",
            "",
        ]
        differences = {
            name: {metric: format_mean_difference(row[metric].values, rows[reference][metric].values) for metric in TESTED}
            for name, row in rows.items()
            if name != reference
        }
        lines += ["| model | " + " | ".join(TESTED) + " |", "| --- |" + " --- |" * len(TESTED)]
        lines += [f"| {name} | " + " | ".join(cells.values()) + " |" for name, cells in differences.items()]
    return "\n".join(lines) + "\n"


def format_mean_difference(values: list[float], reference: list[float]) -> str:
    """Formats the mean difference of two models over the windows, with its standard error."""
    difference = np.subtract(values, reference)
    error = f" ± {difference.std(ddof=1) / len(difference) ** 0.5:.4f}" if len(difference) > 1 else ""
    return f"{difference.mean():+.4f}{error} ({int((difference > 0).sum())} of {len(difference)})"
