"""What is lost when pictures or texts are missing at test time.

    python benchmarks/missing.py artifacts/ablation/full-0 artifacts/ablation/no_view-0

For each run: of a share of all items, drawn at random, the picture or the text is taken away; the MLLM as it was trained
exports the catalogue that is left, and the session model as it was trained is put over it (`tpad index`). Printed is
HR@10 on the test sessions, and how much of it was lost; and by a session model trained anew on what is left, which knows what
such vectors are worth. The same items lose the same things in every run. On the sample shop a colour is in the picture alone
and a style in the text alone: what the true law loses that cannot see them is printed too.
"""

import argparse
import json
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.artifact import open_verified
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.core.files import write_json
from pipeline.data.catalog import load_catalog
from pipeline.data.sample_shop import build_law, ceiling
from pipeline.data.session_log import load_sessions
from pipeline.data.split import split_sessions
from pipeline.export.export import export
from recommender.metrics.evaluator import model_ranks
from recommender.metrics.ranks import summarise
from recommender.retrieval.saved_model import load_model
from recommender.session_model.windows import cases_of
from recommender.training.rebuild_index import refresh
from recommender.training.train import train_sbr

SHARES = (0.3, 0.5)


def drawn(count: int, share: float, seed: int) -> np.ndarray:
    """(count,) bool: the items that lose something."""
    lost: np.ndarray = np.random.default_rng(seed).random(count) < share
    return lost


def without(items: pa.Table, what: str, share: float, config: Config, seed: int) -> pa.Table:
    """The catalogue, where `share` of the items have no picture (`what`: images) or none of the shown columns (texts)."""
    gone = pa.array(drawn(len(items), share, seed))
    shown = config.data.text or [name for name in items.column_names if name not in ("item_id", "image")]
    columns = ["image"] if what == "images" else [name for name in shown if name in items.column_names]
    for name in columns:
        column = items[name].combine_chunks()
        items = items.set_column(items.column_names.index(name), name, pc.if_else(gone, pa.scalar(None, column.type), column))
    return items


def hit_rate(run: Path, data: Path, config: Config) -> float:
    """HR@10 of the published session model on the test sessions."""
    model = load_model(open_verified(run / "sbr", "sbr", "run `tpad train-sbr` first").path)
    split = split_sessions(load_sessions(data, load_catalog(data)), config.data)
    return summarise(model_ranks(model, cases_of(split.test, config.data.max_prefix)))["HR@10"]


def law_hit_rate(data: Path, config: Config, unseen: dict[str, np.ndarray]) -> float:
    """HR@10 of the law of the sample shop, whose colours and styles cannot be seen for the items of `unseen`."""
    test = split_sessions(load_sessions(data, load_catalog(data)), config.data).test
    return ceiling(build_law(config.shop, unseen), np.split(test.rows, test.offsets[1:-1]), config.data.max_prefix)["all"]["HR@10"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="runs that `tpad train-sbr` has ended")
    parser.add_argument("--folder", type=Path, default=Path("artifacts/benchmark-missing"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| run | missing | HR@10 | lost | lost when trained anew |\n| --- | --- | --- | --- | --- |", flush=True)
    for run in args.runs:
        config = load_config(run / "config.yaml", ["sbr.models=[full]"])
        data = run / json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]
        whole = hit_rate(run, data, config)
        print(f"| {run.name} | nothing | {whole:.4f} | | |", flush=True)
        for what in ("images", "texts"):
            for share in SHARES:
                shutil.rmtree(args.folder, ignore_errors=True)
                (args.folder / "data").mkdir(parents=True)
                for kind in ("mllm", "sbr"):
                    shutil.copytree(run / kind, args.folder / kind)
                shutil.copy(data / "sessions.parquet", args.folder / "data")
                items = without(pq.read_table(data / "items.parquet"), what, share, config, args.seed)
                pq.write_table(items, args.folder / "data" / "items.parquet")
                write_json(args.folder / "run.json", {"data": "data"})
                export(config, args.folder, args.folder / "data")
                refresh(args.folder, args.folder / "data")
                found = hit_rate(args.folder, args.folder / "data", config)
                with redirect_stdout(sys.stderr):
                    train_sbr(config, args.folder, args.folder / "data", fresh=True)
                anew = hit_rate(args.folder, args.folder / "data", config)
                lost = f"{1 - found / whole:.1%} | {1 - anew / whole:.1%}"
                print(f"| {run.name} | {share:.0%} of the {what} | {found:.4f} | {lost} |", flush=True)
    if (data / "ceiling.json").exists():
        whole = law_hit_rate(data, config, {})
        print(f"| the true law | nothing | {whole:.4f} | | |")
        for what, seen_there in (("images", "colour"), ("texts", "style")):
            for share in SHARES:
                found = law_hit_rate(data, config, {seen_there: drawn(config.shop.items, share, args.seed)})
                print(f"| the true law | {share:.0%} of the {what} | {found:.4f} | {1 - found / whole:.1%} | |", flush=True)


if __name__ == "__main__":
    main()
