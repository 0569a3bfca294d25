"""Formats tables of results, for a terminal and in Markdown."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from pipeline.core.errors import printable
from pipeline.core.printed_table import print_table
from recommender.baselines.registry import BASELINES, MODELS
from recommender.metrics.evaluator import REFIT_NOTE, BucketMetrics
from recommender.metrics.significance import Difference

COLUMNS = (("all", "HR@10"), ("all", "HR@20"), ("all", "MRR@20"), ("all", "NDCG@20"), ("warm", "HR@20"), ("cold", "HR@20"))
ROWS = (*BASELINES, *MODELS, "ceiling")


def print_models(results: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Prints a table of results, its rows in the order of `ROWS`.

    `results`: name -> {"mean": BucketMetrics, "std": BucketMetrics, "seeds": n}."""
    first: BucketMetrics = results["popularity"]["mean"]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for bucket, metric in COLUMNS:
        name = metric if bucket == "all" else f"{bucket} {metric}"
        table.add_column(
            f"{name}\n({int(first[bucket]['cases'])} cases)" if metric in ("HR@10", "HR@20") else name, justify="right", no_wrap=True
        )
    for name in sorted(results, key=ROWS.index):
        table.add_row(name, *(_cell(results[name], bucket, metric) for bucket, metric in COLUMNS))
    print_table(table)


def _cell(result: Mapping[str, Any], bucket: str, metric: str) -> str:
    value = result["mean"].get(bucket, {}).get(metric)
    if value is None:
        return "-"
    spread = f" +- {result['std'][bucket][metric]:.4f}" if result.get("seeds", 1) > 1 else ""
    return f"{value:.4f}{spread}"


def print_results(metrics: dict[str, Any]) -> None:
    """Prints the facts about the data and the table of results; `metrics` is the content of metrics.json."""
    facts = metrics["facts"]
    print(f"{facts['items']} items, {facts['cold_items']} of them in no training session")
    print(
        f"sessions: {facts['train_sessions']} training, {facts['valid_sessions']} validation, {facts['test_sessions']} test "
        f"({facts['test_sessions_also_in_training']} of these also in training, {facts['test_sessions_repeated']} repeated); "
        f"{facts['one_event_sessions_dropped']} of one event left out"
    )
    if (calibration := facts.get("calibration")) is not None and calibration["told"]:
        print(printable(calibration["told"]))
    print_models(metrics["results"], "Next item, every test position, all items ranked")
    if facts.get("refit"):
        print(REFIT_NOTE)


class Figure(NamedTuple):
    """One metric of one row, over the seeds."""

    values: list[float]
    against: Difference | None = None  # to the reference model, on the same cases

    def __str__(self) -> str:
        deviation = f" ± {np.std(self.values, ddof=1):.4f}" if len(self.values) > 1 else ""
        return f"{np.mean(self.values):.4f}{deviation}"


Row = dict[str, Figure]  # by metric


def table(rows: Mapping[str, Row], columns: Mapping[str, str], cell: Any = str) -> list[str]:
    """Returns the lines of a Markdown table. `columns`: metric -> head; a column without any value is left out."""
    heads = {metric: head for metric, head in columns.items() if any(metric in row for row in rows.values())}
    lines = [f"| | {' | '.join(heads.values())} |", "| --- |" + " ---: |" * len(heads)]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(cell(row[metric]) if metric in row else '-' for metric in heads)} |")
    return lines


def format_difference(difference: Difference | None) -> str:
    """Formats a difference with its interval and p."""
    if difference is None:
        return "-"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}], p {difference.p:.4f}"
