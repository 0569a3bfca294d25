"""What the defaults reach on shops of other laws: the sample shop, copies with other cold items, and other draws of its law.

    python benchmarks/shops.py --work artifacts/shops --out artifacts/shops/shops.json

Each cell is a shop and a seed of all trainings: `tpad distill`, `export-embeddings` and `train-sbr`, with the default settings otherwise.
The figures are in percent of what the law itself reaches on the test sessions. A cell that is finished is not made again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOPS = {
    "sample shop": [],
    "no cold target in validation": ["shop.launch=test"],
    "2 % cold items": ["shop.cold_items=0.02"],
    "30 % cold items": ["shop.cold_items=0.3"],
    "another law (seed 1)": ["shop.seed=1"],
    "another law (seed 2)": ["shop.seed=2"],
}
FIGURES = {"HR@10": ("all", "HR@10"), "cold HR@20": ("cold", "HR@20"), "warm HR@20": ("warm", "HR@20")}


def cell(run: Path, settings: list[str]) -> dict[str, float]:
    """The percentages of one run, and the seconds it took."""
    path = run / "cell.json"
    if not path.exists():
        began = time.perf_counter()
        words = [word for setting in settings for word in ("--set", setting)]
        for command in ("distill", "export-embeddings", "train-sbr"):
            subprocess.run([sys.executable, "-m", "cli", command, "--run", str(run), *words], cwd=ROOT, check=True)
        results = json.loads(sorted(run.glob("sbr/v*/metrics.json"))[-1].read_text(encoding="utf-8"))["results"]
        full, ceiling = (results[name]["mean"] for name in ("full", "ceiling"))
        found = {name: 100 * full[bucket][metric] / ceiling[bucket][metric] for name, (bucket, metric) in FIGURES.items()}
        path.write_text(json.dumps(found | {"seconds": time.perf_counter() - began}) + "\n", encoding="utf-8")
    cells: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs, kept and gone on with")
    parser.add_argument("--shops", nargs="+", choices=SHOPS, default=list(SHOPS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="a setting, as of tpad")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    cells: dict[str, list[dict[str, float]]] = {shop: [] for shop in options.shops}
    rows = []
    for seed in range(options.seeds):
        for number, shop in enumerate(options.shops):
            settings = [*SHOPS[shop], f"seed={seed}", "sbr.models=[full]", "sbr.refit=false", *options.set]
            cells[shop].append(cell((options.work / f"{number}-{seed}").resolve(), settings))
            print(shop, seed, {name: round(value, 1) for name, value in cells[shop][-1].items()}, flush=True)
        rows = [
            {"shop": shop} | {f"{name}, % of the ceiling": spread([one[name] for one in found]) for name in FIGURES}
            for shop, found in cells.items()
        ]
        if options.out:
            options.out.write_text(json.dumps({"rows": rows, "cells": cells}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
