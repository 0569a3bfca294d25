"""Indexes of the session model: time to build, bytes, recall@20 against scoring every item, and latency, on drawn catalogues.

    python benchmarks/index.py --items 100000 --index flat,hnsw,ivf

Items stand in clusters (one for each 50), by content and by id alike, and sessions wander between neighbouring ones. The
model's parameters are those it starts with. The searches of a session through all indexes stand side by side in time; the
CPU milliseconds, which a busy machine does not stretch, are of all threads together.
"""

import argparse
import time

import numpy as np
import torch

from recommender.retrieval.index import ItemIndex, build_indexes, factory_of
from recommender.retrieval.index_tuning import CHECK_K, exact_kth_scores
from recommender.session_model.config import ModelConfig
from recommender.session_model.model import SessionModel
from recommender.session_model.numpy_model import NumpySessionModel

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--index", default="flat,hnsw,ivf", help="settings of sbr.index")
    parser.add_argument("--effort", default="1", help="multiples of the usual effort of a search")
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
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
