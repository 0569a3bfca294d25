"""Indexes of the session model: time to build, bytes, recall@20 against scoring every item, and latency, on drawn catalogues.

    python benchmarks/index.py --items 100000 --index flat,hnsw,ivf
    python benchmarks/index.py --items 5000000 --index ivfpq --published /tmp/run

With `--published` the model is published there with the (one) index, and two processes, one after the other, open and use it as `tpad
recommend` does: seconds until they are ready, recall, latency, and memory. What is theirs alone (Private) is what each further process
costs; all that they have resident (Rss) holds also the pages of the mapped files, which they share.

Items stand in clusters (one for each 50), by content and by id alike, and sessions wander between neighbouring ones. The
model's parameters are those it starts with. The searches of a session through all indexes stand side by side in time; the
CPU milliseconds, which a busy machine does not stretch, are of all threads together.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.core.artifact import stage
from recommender.retrieval.index import ItemIndex, build_indexes, factory_of
from recommender.retrieval.index_tuning import CHECK_K, exact_kth_scores
from recommender.session_model.config import ModelConfig
from recommender.session_model.model import SessionModel
from recommender.session_model.numpy_model import NumpySessionModel
from recommender.session_model.whitening import Whitening

DIM, PREFIX = 64, 20


def clustered(rng: np.random.Generator, cluster: np.ndarray, spread: float) -> np.ndarray:
    """(N, DIM), centres of length one"""
    centres = rng.normal(size=(cluster.max() + 1, DIM)).astype(np.float32) / DIM**0.5
    return centres[cluster] + np.float32(spread / DIM**0.5) * rng.normal(size=(len(cluster), DIM)).astype(np.float32)


def draw_model(items: int, seed: int = 0) -> tuple[SessionModel, list[list[int]]]:
    """The model over a drawn log, and sessions that are not in it."""
    rng = np.random.default_rng(seed)
    clusters = max(2, items // 50)
    cluster = np.arange(items) % clusters
    sessions = items // 5
    lengths = np.minimum(2 + rng.geometric(0.25, size=sessions + 1000), PREFIX)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    begin = np.repeat(rng.integers(clusters, size=len(lengths)), lengths)
    step = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    member = (rng.random(offsets[-1]) ** 2 * (items // clusters)).astype(np.int64)  # some of a cluster are popular
    rows = np.minimum((begin + step // 2) % clusters + member * clusters, items - 1).astype(np.int32)
    config = ModelConfig(items, DIM, True, DIM, PREFIX)
    end = offsets[sessions]
    torch.manual_seed(seed)
    model = SessionModel(config, clustered(rng, cluster, 0.7), rows[:end], offsets[: sessions + 1])
    with torch.no_grad():
        model.project.weight.copy_(torch.eye(DIM))
        model.ids.weight.copy_(torch.as_tensor(clustered(rng, cluster, 0.7)))
    return model.eval(), [rows[offsets[n] : offsets[n + 1]].tolist() for n in range(sessions, len(lengths))]


def publish(root: Path, model: SessionModel, sessions: list[list[int]], setting: str) -> None:
    """Publishes the model as `tpad train-sbr` does, of items that have an id and a title."""
    from recommender.retrieval.saved_model import write_model

    count = model.config.items
    item_ids = [f"item-{n:08d}" for n in range(count)]
    catalog: Any = SimpleNamespace(item_ids=item_ids, titles=pa.array([f"thing number {n}" for n in range(count)]), availability=None)
    catalog.attributes, catalog.row = (lambda: {}), {f"item-{n:08d}": n for n in range(count)}
    samples = [[item_ids[row] for row in session] for session in sessions]
    whitening = {"knowledge": Whitening(*(np.zeros((1, 1), np.float32) for _ in Whitening._fields))}
    with stage(root / "sbr", "sbr") as staging:
        index = write_model(staging.path, model, catalog, model.counts.numpy().astype(np.int64), samples, whitening, setting)
        staging.publish({"settings": {}, "index": index, "embeddings_manifest_sha256": None})


def use(root: Path) -> None:
    """Opens the published model, in a process of its own, and prints what that takes."""
    began = time.perf_counter()
    from recommender.serving.recommender import Recommender

    recommender = Recommender.load(root)
    recommender.recommend(recommender.samples[0], 20)
    ready = time.perf_counter() - began
    opened = memory()
    waits, works = [], []
    for session in recommender.samples:
        start, begun = time.perf_counter(), time.process_time()
        recommender.recommend(session, 20)
        waits.append((time.perf_counter() - start) * 1000)
        works.append((time.process_time() - begun) * 1000)
    low, high, work = *np.percentile(waits, [50, 95]), np.median(works)
    facts = recommender.version.manifest["index"]
    later = f"after {len(waits)} sessions: {memory()}; p50 {low:.2f} ms, p95 {high:.2f} ms, CPU {work:.2f} ms"
    print(f"ready in {ready:.1f} s: {opened}; {later}; {facts}", flush=True)
    sys.stdin.readline()  # until the other process is measured too


def memory() -> str:
    """Says how much of the memory of this process is resident, and how much of that is its own."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    kib = {name: int(value.split()[0]) for name, value in fields.items()}
    return f"Rss {kib['Rss'] / 2**20:.2f} GiB, Private {(kib['Private_Clean'] + kib['Private_Dirty']) / 2**20:.2f} GiB"


def use_twice(root: Path) -> None:
    words = [sys.executable, __file__, "--use", str(root)]
    processes = []
    for number in (1, 2):
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        print(f"process {number}: {process.stdout.readline().strip()}", flush=True)
        processes.append(process)
    for process in processes:
        process.communicate("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--index", default="flat,hnsw,ivf", help="settings of sbr.index")
    parser.add_argument("--effort", default="1", help="multiples of the usual effort of a search")
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--published", type=Path, help="folder of a run to publish in, or with a model that was published so")
    parser.add_argument("--use", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.use:
        use(chosen.use)
        return
    if chosen.published:
        if not (chosen.published / "sbr" / "current").exists():
            model, sessions = draw_model(chosen.items, chosen.seed)
            began = time.perf_counter()
            publish(chosen.published, model, sessions[: chosen.sessions], chosen.index)
            print(f"{chosen.items} items, {chosen.index}: published in {time.perf_counter() - began:.0f} s", flush=True)
            del model
        use_twice(chosen.published)
        return
    model, sessions = draw_model(chosen.items, chosen.seed)
    efforts = [float(effort) for effort in chosen.effort.split(",")]
    ranker = NumpySessionModel.of(model)
    indexes, built = {}, {}
    for setting in chosen.index.split(","):
        began = time.perf_counter()
        indexes[setting] = ItemIndex(build_indexes(ranker, setting), ranker)
        built[setting] = time.perf_counter() - began
    asking = sessions[: chosen.sessions]
    worst = exact_kth_scores(ranker, [ranker.encode(session) for session in asking])
    hits = {(setting, effort): 0 for setting in indexes for effort in efforts}
    times: dict[tuple[str, float], list[list[float]]] = {key: [] for key in hits}  # wall and CPU
    for session, score in zip(asking, worst, strict=True):
        for setting, effort in hits:
            indexes[setting].spend(effort)
            wall, work = time.perf_counter(), time.process_time()
            best = indexes[setting].top(ranker.encode(session), CHECK_K)[0]
            times[setting, effort].append([(time.perf_counter() - wall) * 1000, (time.process_time() - work) * 1000])
            hits[setting, effort] += int((best >= score - 1e-4).sum())
    mean = np.mean([min(len(session), PREFIX) for session in asking])
    print(f"{chosen.items} items, {len(asking)} sessions of {mean:.1f} items, {torch.get_num_threads()} threads")
    print(f"{'index':<24} {'effort':>6} {'build s':>8} {'recall@20':>9} {'p50 ms':>7} {'p95 ms':>7} {'CPU ms':>7}")
    for setting, effort in hits:
        walls, works = np.array(times[setting, effort]).T
        low, high, work = *np.percentile(walls, [50, 95]), np.median(works)
        share = hits[setting, effort] / (CHECK_K * len(asking))
        name = f"{setting} ({factory_of(setting, chosen.items)})"
        print(f"{name:<24} {effort:>6g} {built[setting]:>8.1f} {share:>9.4f} {low:>7.2f} {high:>7.2f} {work:>7.2f}")


if __name__ == "__main__":
    main()
