"""Writes the tables of an ablation: ablation.md, ablation.csv and, with matplotlib, ablation.png.

Figures are means over the seeds. A difference to the full method is over the same test cases; its interval is a bootstrap over test
sessions (`significance.paired_bootstrap`) and does not include the variation between seeds, which the standard deviation shows.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.core.artifact import decoding, open_verified
from pipeline.core.config import Config
from pipeline.core.errors import note
from pipeline.core.files import read_sealed, replacing
from recommender.metrics.ranks import case_values
from recommender.metrics.results_table import Figure, Row, format_difference, table
from recommender.metrics.significance import paired_bootstrap
from recommender.training.dataset import load_training_data

PROBES = "probes.json"
DOWNSTREAM = ("HR@10", "HR@20", "MRR@20", "warm HR@20", "cold HR@20")
VECTORS = {  # name in probes.json -> head of its column
    "retrieval HR@10 of whole": "retrieval HR@10",
    "retrieval HR@20 of whole": "HR@20",
    "retrieval HR@20 of knowledge": "HR@20 of k",
    "retrieval HR@20 of transition": "HR@20 of p",
    "accuracy from knowledge": "attributes from k",
    "accuracy from transition": "from p",
    "accuracy from whole": "from both",
    "CKA": "CKA(k, p)",
    "CLUB": "CLUB bound, nats a dimension",
}
COST = {
    "training seconds": "training, s",
    "export passes": "export passes",
    "export seconds per 1000 items": "export, s per 1000 items",
}


def report(config: Config, run: Path, data: Path, variants: Sequence[str], seeds: Sequence[int]) -> None:
    """Writes the report files of the finished ablation in `run`, and prints the Markdown."""
    rows = compare(config, run, data, variants, seeds)
    text = markdown(rows, seeds)
    for name, content in (("ablation.md", text), ("ablation.csv", as_csv(rows))):
        with replacing(run / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(text)
    draw(rows, run / "ablation.png")


def compare(config: Config, run: Path, data: Path, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, Row]:
    """Returns the figures of the variants and of the ID-only and content-only session models of the full one, in this order."""
    ranks = {variant: [read_ranks(run / f"{variant}-{seed}") for seed in seeds] for variant in variants}
    ranks_by_row = {variant: [table["full"] for table in tables] for variant, tables in ranks.items()}
    others = [name for name in ranks["full"][0] if name in ("ID-only", "content-only")]
    ranks_by_row |= {name: [table[name] for table in ranks["full"]] for name in others}
    inputs = load_training_data(config, run / f"full-{seeds[0]}", data)
    cases = ranks["full"][0]
    warm = inputs.counts[[inputs.catalog.row[item] for item in cases["item_id"]]] > 0
    rows: dict[str, Row] = {}
    for name, by_seed in ranks_by_row.items():
        rows[name] = {}
        for metric in DOWNSTREAM:
            bucket, _, plain = metric.rpartition(" ")
            mask = {"": np.ones(len(warm), bool), "warm": warm, "cold": ~warm}[bucket]
            if mask.any():
                pair = (by_seed, ranks_by_row["full"])
                ours, full = (np.stack([case_values(ranks[mask], plain) for ranks in seeds]).astype(float) for seeds in pair)
                against = None if name == "full" else paired_bootstrap(ours.mean(0), full.mean(0), cases["session_id"][mask])
                rows[name][metric] = Figure(ours.mean(1).tolist(), against)
    for variant in variants:
        probes = [probes_of(run / f"{variant}-{seed}") for seed in seeds]
        rows[variant] |= {
            metric: Figure([values[metric] for values in probes]) for metric in probes[0] if all(metric in values for values in probes)
        }
    return rows


def probes_of(cell: Path) -> dict[str, float]:
    """Reads the probes of a cell. Raises `UserError` (4)."""
    with decoding(cell / PROBES, "run `tpad ablate`"):
        return dict(read_sealed(cell / PROBES)["values"])


def read_ranks(cell: Path) -> dict[str, Any]:
    """Returns the columns of the published ranks of a cell."""
    table = pq.read_table(open_verified(cell / "sbr", "sbr", "run `tpad ablate` first").path / "ranks.parquet")
    return {name: table[name].to_numpy() for name in table.column_names}


def markdown(rows: Mapping[str, Row], seeds: Sequence[int]) -> str:
    """Returns the report as Markdown."""
    summary = "mean ± standard deviation" if len(seeds) > 1 else "one run each"
    lines = ["# Ablation", "", f"Seeds {', '.join(map(str, seeds))}: {summary}.", "", "## Next item, by the session model", ""]
    lines += table(rows, {metric: metric for metric in DOWNSTREAM})
    lines += ["", "Differences to full, with their 95 % interval and two-sided p (paired bootstrap over test sessions):", ""]
    lines += table(
        {name: row for name, row in rows.items() if name != "full"},
        {metric: metric for metric in DOWNSTREAM},
        lambda f: format_difference(f.against),
    )
    lines += ["", "## What the vectors hold, without a session model", ""]
    lines += ["Retrieval: all items by cosine to the last one. Attributes: accuracy of a linear probe on held-out items.", ""]
    lines += table({name: row for name, row in rows.items() if "export passes" in row}, VECTORS)
    lines += ["", "## Cost", ""]
    lines += table({name: row for name, row in rows.items() if "export passes" in row}, COST, lambda f: f"{np.mean(f.values):.1f}")
    return "\n".join(lines) + "\n"


def as_csv(rows: Mapping[str, Row]) -> str:
    """Returns one CSV line for each row and metric, also for the metrics that the tables omit."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["variant", "metric", "seeds", "mean", "std", "difference", "low", "high", "p"])
    for name, row in rows.items():
        for metric, figure in row.items():
            deviation = [np.std(figure.values, ddof=1)] if len(figure.values) > 1 else [""]
            lines.writerow([name, metric, len(figure.values), np.mean(figure.values), *deviation, *(figure.against or [""] * 4)])
    return out.getvalue()


def draw(rows: Mapping[str, Row], path: Path) -> None:
    """Plots the difference of each row to full with its interval, for HR@10 and cold HR@20."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        note("no plot without matplotlib: install the extra `ablate`, and start again")
        return
    metrics = [metric for metric in ("HR@10", "cold HR@20") if metric in rows["full"]]
    shown = {name: row for name, row in rows.items() if name != "full"}
    canvas = Canvas(figsize=(5 * len(metrics), 1.5 + 0.35 * len(shown)), layout="constrained")
    for panel, metric in zip(canvas.subplots(1, len(metrics), squeeze=False, sharey=True)[0], metrics, strict=True):
        for place, row in enumerate(shown.values()):
            if difference := row[metric].against:
                panel.errorbar(
                    difference.mean,
                    -place,
                    xerr=[[difference.mean - difference.low], [difference.high - difference.mean]],
                    fmt="o",
                    color="C0",
                    capsize=3,
                )
        panel.axvline(0, color="0.6", linewidth=1)
        panel.set_title(f"{metric}: difference to full", fontsize=10)
        panel.set_yticks([-place for place in range(len(shown))], list(shown))
    with replacing(path) as temporary:
        canvas.savefig(temporary, format="png", dpi=150)
