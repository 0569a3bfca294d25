"""How long does `tpad prepare` take, and how much memory, on logs of any size?

    python benchmarks/prepare.py --events 20000000 --work /tmp/prepare --memory 4GB --out benchmarks/results/prepare.json

The log is synthetic: shuffled events of a tenth as many users and a hundredth as many items, over 60 days, as Parquet (`--csv`: also as
CSV). The yardstick is DuckDB's own sorted copy of the same file, with the same memory. Every measurement is a process of its own; its
memory is the most that the kernel has seen resident.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
PIECE = 5_000_000
COPY = """
import duckdb, sys
source, target, memory, spill = sys.argv[1:]
db = duckdb.connect()
db.execute(f"set memory_limit = '{memory}'; set temp_directory = '{spill}'; set enable_progress_bar = false")
db.execute(f"copy (select * from '{source}' order by user_id, timestamp) to '{target}' (format parquet)")
"""


def write_log(path: Path, events: int) -> None:
    """Writes the log, if it is not there."""
    if path.exists():
        return
    dice = np.random.default_rng(0)
    schema = pa.schema([("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64())])
    with pq.ParquetWriter(path, schema) if path.suffix == ".parquet" else pacsv.CSVWriter(path, schema) as writer:
        for begin in range(0, events, PIECE):
            rows = min(PIECE, events - begin)
            columns = (dice.integers(0, events // 10, rows), dice.integers(0, events // 100, rows), dice.integers(0, 60 * 86_400, rows))
            writer.write_table(pa.table([columns[0], columns[1], columns[2] + 1_600_000_000], schema=schema))


def measured(command: list[str]) -> dict[str, float]:
    """Runs a command; returns its seconds and its peak of resident memory in GB."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return {"seconds": round(time.perf_counter() - begin, 1), "gigabytes": round(usage.ru_maxrss / 10**6, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[20_000_000])
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--csv", action="store_true", help="the first size also as CSV")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    found = []
    for number, events in enumerate(options.events):
        for suffix in ("parquet", "csv") if options.csv and not number else ("parquet",):
            log, spill, target = (options.work / name for name in (f"log-{events}.{suffix}", "spill", "sorted.parquet"))
            write_log(log, events)
            copy = measured([sys.executable, "-c", COPY, str(log), str(target), options.memory, str(spill)])
            command = [sys.executable, "-m", "cli", "prepare", "--sessions", str(log), "--memory", options.memory]
            prepare = measured([*command, "--out", str(options.work / "data")])
            found.append({"events": events, "format": suffix, "copy": copy, "prepare": prepare})
            found[-1]["ratio"] = round(prepare["seconds"] / copy["seconds"], 2)
            print(json.dumps(found[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps({"memory": options.memory, "cores": os.cpu_count(), "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
