"""`tpad serve` under load: ready when, how quick, how many, and what reloads do to it. Needs the load tool `hey`.

    python benchmarks/serve.py load --items 100000 --seconds 20 --workers 2    latency at 50 requests a second, then as fast as it goes
    python benchmarks/serve.py soak --items 100000 --seconds 600   reloads under load: five good versions, five broken ones

The shop is that of benchmarks/index.py, with an untrained session model, which costs the same. Client and server share the
machine. Sessions have 1, 5 and 50 items; 50 is more than the model reads.
"""

import argparse
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from index import DIM, draw_model
from threadpoolctl import threadpool_limits

from pipeline.core.artifact import OWN_KEYS, open_verified, stage
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import HALVES
from recommender.retrieval.saved_model import write_model
from recommender.serving.recommender import Recommender
from recommender.session_model.whitening import Whitening

LENGTHS, RATE = (1, 5, 50), 50
SESSIONS = 10  # different ones of each length, one after the other


def write_run(run: Path, items: int) -> None:
    """The catalogue of benchmarks/index.py, with the index that `auto` gives it."""
    model, sessions = draw_model(items)
    (run / "data").mkdir(parents=True)
    names = [name(row) for row in range(items)]
    pq.write_table(pa.table({"item_id": names, "title": names}), run / "data" / "items.parquet")
    dim = DIM // len(HALVES)
    whitening = dict.fromkeys(HALVES, Whitening(np.zeros(dim), np.eye(dim)))
    samples = [[name(row) for row in session] for session in sessions[:20]]
    with stage(run / "sbr", "sbr") as staging:
        index = write_model(staging.path, model, load_catalog(run / "data"), np.zeros(items, int), samples, whitening, "auto")
        staging.publish({"embeddings_manifest_sha256": None, "embeddings_version": None, "index": index})
    print(f"{items:,} items, index {index}")


def name(row: int) -> str:
    return f"item-{row:07d}"


def publish_again(run: Path, number: int, broken: bool) -> None:
    """The first version once more; a broken one has a byte changed at the moment it is published."""
    with stage(run / "sbr", "sbr") as staging:
        shutil.copytree(run / "first", staging.path, dirs_exist_ok=True)
        manifest = json.loads((run / "first" / "manifest.json").read_bytes())
        published = staging.publish({key: value for key, value in manifest.items() if key not in OWN_KEYS} | {"number": number})
        if broken:
            with open(published.path / "model.safetensors", "r+b") as file:
                file.seek(100_000)
                file.write(b"broken")


@contextmanager
def serving(run: Path, workers: int = 1) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """The process, its address, and the seconds until it answered that it is ready."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "cli", "serve", "--run", str(run), "--port", "0", "--workers", str(workers)]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(words, stderr=log, text=True) as process:
        try:
            while not (found := re.search(r"http://\S+", said := os.pread(log.fileno(), 4096, 0).decode())):
                assert process.poll() is None, said
                time.sleep(0.005)
            urllib.request.urlopen(f"{found[0]}/readyz").close()
            yield process, found[0], time.perf_counter() - began
        finally:
            process.terminate()


def family(process: subprocess.Popen[str]) -> list[int]:
    """The process and its workers."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [process.pid, *map(int, found.split())]


def memory(process: subprocess.Popen[str]) -> int:
    """MB; what processes share is counted once"""
    found = [re.search(r"Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text()) for pid in family(process)]
    return sum(int(each[1]) for each in found if each) // 1024


def cpu(process: subprocess.Popen[str]) -> float:
    """Seconds of processor time so far: on a busy machine a steadier measure than the clock."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in family(process)]
    return sum(int(of[11]) + int(of[12]) for of in fields) / os.sysconf("SC_CLK_TCK")


def session(items: int, length: int, seed: int = 1) -> list[str]:
    return [name(row) for row in np.random.default_rng(seed).integers(items, size=length)]


def hey(url: str, items: int, length: int, seconds: float, *more: str) -> tuple[np.ndarray, Counter[str]]:
    """Milliseconds of each request, and how often which status. The tool repeats one request, so it is run for each session."""
    lines = []
    for seed in range(SESSIONS):
        body = json.dumps({"session": session(items, length, seed), "k": 20})
        words = [
            "hey",
            "-z",
            f"{seconds / SESSIONS}s",
            "-m",
            "POST",
            "-T",
            "application/json",
            "-d",
            body,
            "-o",
            "csv",
            *more,
            f"{url}/recommend",
        ]
        lines += list(csv.DictReader(io.StringIO(subprocess.run(words, capture_output=True, text=True, check=True).stdout)))
    return np.array([float(line["response-time"]) * 1000 for line in lines]), Counter(line["status-code"] for line in lines)


def inside(run: Path, items: int) -> None:
    """`Recommender.recommend` without the HTTP, on one thread: sessions of other items each time."""
    recommender = Recommender.load(run)
    print("| in process, session | p50 ms | p95 ms |\n| --- | --- | --- |")
    with threadpool_limits(1, "blas"):
        for length in LENGTHS:
            times = []
            for seed in range(300):
                asked = session(items, length, seed)
                began = time.perf_counter()
                recommender.recommend(asked, k=20)
                times.append((time.perf_counter() - began) * 1000)
            print(f"| {length} | {np.percentile(times, 50):.2f} | {np.percentile(times, 95):.2f} |")


def load(run: Path, items: int, seconds: float, workers: int) -> None:
    inside(run, items)
    with serving(run, workers) as (process, url, ready):
        print(f"{items:,} items: ready after {ready:.1f} s, {cpu(process):.1f} s of processor time, {memory(process)} MB")
        print("| load | session | requests a second | p50 ms | p99 ms | processor ms a request | statuses |\n" + "| --- " * 7 + "|")
        for length in LENGTHS:
            hey(url, items, length, 2, "-c", "2")
            for clients, more in ((f"{RATE} a second", ("-c", "1", "-q", str(RATE))), ("8 clients, no pause", ("-c", "8"))):
                before = cpu(process)
                times, statuses = hey(url, items, length, seconds, *more)
                spent = (cpu(process) - before) * 1000 / len(times)
                p50, p99 = np.percentile(times, [50, 99])
                figures = f"{len(times) / seconds:.0f} | {p50:.1f} | {p99:.1f} | {spent:.1f}"
                print(f"| {clients} | {length} | {figures} | {dict(statuses)} |", flush=True)
        print(f"after it {memory(process)} MB")


def soak(run: Path, items: int, seconds: float, workers: int) -> None:
    """Every answer is held against the first one of the version it names."""
    shutil.copytree(open_verified(run / "sbr", "sbr", "").path, run / "first", dirs_exist_ok=True)
    bodies = [json.dumps({"session": session(items, length), "k": 20}).encode() for length in LENGTHS]
    first: dict[tuple[str, int], object] = {}
    wrong: Counter[str] = Counter()
    stop = threading.Event()

    def client(number: int) -> int:
        answered = 0
        while not stop.is_set():
            which = (number + answered) % len(bodies)
            request = urllib.request.Request(f"{url}/recommend", bodies[which], {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=30) as found:
                    answer = json.load(found)
                if first.setdefault((answer["version"], which), answer["items"]) != answer["items"]:
                    wrong["another answer of the same version"] += 1
            except Exception as error:
                wrong[f"{type(error).__name__}: {error}"] += 1
            answered += 1
            time.sleep(0.02)
        return answered

    with serving(run, workers) as (process, url, _), ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client, number) for number in range(3)]
        sizes = [memory(process)]
        for number in range(10):
            time.sleep(seconds / 11)
            sizes.append(memory(process))
            publish_again(run, number, broken=number % 2 == 1)
        time.sleep(seconds / 11)
        sizes.append(memory(process))
        with urllib.request.urlopen(f"{url}/metrics") as found:
            reloads = re.findall(r'tpad_reloads_total\{result="(.*?)"\} (\S+)', found.read().decode())
        stop.set()
        answered = sum(future.result() for future in clients)
    print(f"{answered} requests in {seconds:.0f} s, {sum(wrong.values())} failed {dict(wrong)}; reloads {dict(reloads)}")
    print(f"versions that answered: {sorted({version for version, _ in first})}; MB resident over time: {sizes}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["make", "load", "soak"])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--run", type=Path, help="where the shop is kept; it is made if it is not there")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = given.run or Path(folder)
        if not (run / "sbr" / "current").exists():
            write_run(run, given.items)
        {"make": lambda *_: None, "load": load, "soak": soak}[given.mode](run, given.items, given.seconds, given.workers)
