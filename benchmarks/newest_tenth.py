"""What a refit on all sessions is worth: the published model and its held-out twin on a newest tenth that neither has seen.

    python benchmarks/newest_tenth.py --data data/movielens --out benchmarks/results/newest-tenth-movielens.json

The newest tenth of the sessions is kept back from everything. On the other nine tenths the ID-only model is trained as by
`tpad train-sbr`: its held-out twin on the training sessions of the ordinary split, and the refitted model on all nine tenths. Both, and
co-occurrence counts of all nine tenths, rank the kept sessions. `--update` also times `tpad train-sbr --update` over one new day of
the kept tenth (a ninetieth of the log) against a training on all sessions up to there.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.data.catalog import load_catalog
from pipeline.data.data_folder import ITEMS, SESSIONS
from pipeline.data.session_log import SessionLog, load_sessions
from recommender.baselines.registry import Model, build_baseline
from recommender.metrics.evaluator import baseline_ranks, model_ranks
from recommender.metrics.ranks import case_values
from recommender.metrics.significance import paired_bootstrap
from recommender.retrieval.saved_model import load_model
from recommender.session_model.windows import cases_of
from recommender.training.calibration import apply
from recommender.training.dataset import load_training_data
from recommender.training.train import train_sbr
from recommender.training.trainer import make_accelerator, refit_model, train_model
from recommender.training.update import update_sbr

METRICS = ("HR@20", "MRR@20")
NAME = "ID-only"


def write_part(data: Path, out: Path, log: SessionLog, which: np.ndarray) -> Path:
    """A data folder with some of the sessions of `log` alone, and all items."""
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pq.read_table(data / ITEMS), out / ITEMS)
    table = pq.read_table(data / SESSIONS)
    kept = pa.array([log.session_ids[number] for number in which], pa.string())
    pq.write_table(table.filter(pc.is_in(table["session_id"], kept)), out / SESSIONS)
    return out


def refitted(config: Config, work: Path, data: Path, seed: int) -> tuple[Model, Model]:
    """The held-out twin and the model that is published."""
    accelerator, inputs = make_accelerator(), load_training_data(config, work, data)
    twin = train_model(NAME, seed, config, inputs, inputs.windows(config.data.max_prefix)[:2], accelerator, work, fresh=False)
    model = refit_model(NAME, seed, config, load_training_data(config, work, data, everything=True), accelerator, work, False, twin.epochs)
    assert twin.calibration is not None
    apply(model, twin.calibration)  # type: ignore[arg-type]
    return twin.model, model


def compare(config: Config, data: Path, work: Path, seeds: int) -> dict[str, float]:
    log = load_sessions(data, load_catalog(data))
    kept = np.arange(len(log) - len(log) // 10, len(log))
    part = write_part(data, work / "data", log, np.arange(len(log) - len(kept)))
    cases = cases_of(log.select(kept), config.data.max_prefix)
    session = cases.session[np.nonzero(cases.targets != -1)[0]]
    train = load_training_data(config, work, part, everything=True).split.train
    counts = build_baseline("co-occurrence", train, len(load_catalog(data)))
    ranks = {"co-occurrence": [baseline_ranks(counts, cases)], "held-out twin": [], "refitted": []}
    for seed in range(seeds):
        twin, model = refitted(config, work / str(seed), part, seed)
        ranks["held-out twin"].append(model_ranks(twin, cases))
        ranks["refitted"].append(model_ranks(model, cases))
    values = {(name, metric): [case_values(of_seed, metric) for of_seed in runs] for name, runs in ranks.items() for metric in METRICS}
    figures = {f"{name} {metric}": float(np.mean(runs)) for (name, metric), runs in values.items()}
    for metric in METRICS:
        ours, theirs = (np.mean(values[name, metric], axis=0) for name in ("refitted", "held-out twin"))
        difference = paired_bootstrap(ours, theirs, session)
        figures |= {f"gain {metric}": difference.mean / theirs.mean(), f"gain {metric} p": difference.p}
        figures |= {f"gain {metric} low": difference.low / theirs.mean(), f"gain {metric} high": difference.high / theirs.mean()}
    return {"sessions": len(log) - len(kept), "kept sessions": len(kept), "cases": len(session), "seeds": seeds, **figures}


def rows_of(figures: dict[str, float]) -> list[dict[str, float | str]]:
    """The figures of `compare` as a table: a row a model."""
    rows: list[dict[str, float | str]] = []
    for name in ("co-occurrence", "held-out twin", "refitted"):
        rows.append({"model": name} | {metric: figures[f"{name} {metric}"] for metric in METRICS})
    row: dict[str, float | str] = {"model": "refitted over held-out twin, %"}
    for metric in METRICS:
        mean, low, high = (100 * figures[f"gain {metric}{end}"] for end in ("", " low", " high"))
        row[metric] = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    rows.append(row)
    return rows


def nightly(config: Config, data: Path, work: Path) -> dict[str, object]:
    """One new day of the log: the update against a training on everything, on the sessions after it."""
    log = load_sessions(data, load_catalog(data))
    day, until = len(log) // 90, len(log) - len(log) // 10
    before = write_part(data, work / "before", log, np.arange(until))
    after = write_part(data, work / "after", log, np.arange(until + day))
    began = time.perf_counter()
    train_sbr(config, work / "run", before)
    update_began = time.perf_counter()
    updated = update_sbr(config, work / "run", after)
    update_seconds = time.perf_counter() - update_began
    full_began = time.perf_counter()
    full = train_sbr(config, work / "full", after)
    full_seconds = time.perf_counter() - full_began
    cases = cases_of(log.select(np.arange(until + day, len(log))), config.data.max_prefix)
    found = {}
    for name, version in (("updated", updated.version), ("trained anew", full.version)):
        ranks = model_ranks(load_model(version.path), cases)
        found |= {f"{name} {metric}": float(case_values(ranks, metric).mean()) for metric in METRICS}
    return {
        "events": len(log.rows),
        "new sessions": day,
        "learned sessions": updated.sessions,
        "first training seconds": round(update_began - began, 1),
        "update seconds": round(update_seconds, 1),
        "training anew seconds": round(full_seconds, 1),
        "update / training anew, seconds": update_seconds / full_seconds,
        **found,
        "HR@20 lost by the update, share": 1 - found["updated HR@20"] / found["trained anew HR@20"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder, as of `tpad prepare`")
    parser.add_argument("--config", type=Path, help="settings; the models are ID-only, whatever they say")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--update", action="store_true", help="time the nightly update instead")
    parser.add_argument("--work", type=Path, help="folder to work in, kept and gone on with; default: one that is removed")
    parser.add_argument("--set", action="append", default=[], help="a setting, as of tpad")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    config = load_config(options.config, [*options.set, f"sbr.models=[{NAME}]"])
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        found = nightly(config, options.data, work) if options.update else compare(config, options.data, work, options.seeds)
    text = json.dumps(found if options.update else {"rows": rows_of(found), "figures": found}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
