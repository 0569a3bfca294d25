"""The session model's speed and memory, beside SR-GNN as its authors built it (benchmarks/srgnn_reference.py) and, with --recbole,
RecBole's SASRec (benchmarks/recbole_sasrec.py), whose large batches slow down what is trained in the same process: --models "" then.

    python benchmarks/sbr.py train       cases a second of training, interleaved rounds, medians of ratios
    python benchmarks/sbr.py accuracy    HR@20 and MRR@20 of the test after as many epochs each
    python benchmarks/sbr.py evaluate    test sessions a second, all items ranked
    python benchmarks/sbr.py memory      a million items and sessions in training: peak memory, seconds a step

Sessions are drawn from a law: an item has ten followers, each half as likely as the one before, and after one event in five
comes any item, by a Zipf law. Vectors of `full` are random: they cost what real ones do.
"""

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from srgnn_reference import SRGNN, samples_of

from pipeline.core.checkpoint import Checkpoints
from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from recommender.metrics.evaluator import model_ranks
from recommender.metrics.ranks import summarise, target_ranks
from recommender.session_model.windows import PAD, batches, cases_of, pack, prefixes_of
from recommender.training.trainer import Training, build_model, make_accelerator

PREFIX, CONTENT = 20, 128
SRGNN_BATCH, RECBOLE_BATCH = 100, 2048  # samples, by default


def draw_log(items: int, sessions: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """rows and offsets, the events of all sessions drawn side by side"""
    rng = np.random.default_rng(seed)
    followers = np.random.default_rng(1).integers(items, size=(items, 10), dtype=np.int32)
    lengths = np.minimum(1 + rng.geometric(0.25, size=sessions), PREFIX + 1)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.empty(offsets[-1], np.int32)
    now = zipf(rng, items, sessions)
    for step in range(lengths.max()):
        there = lengths > step
        rows[offsets[:-1][there] + step] = now[there]
        next_ = followers[now, np.minimum(rng.geometric(0.5, size=sessions) - 1, 9)]
        now = np.where(rng.random(sessions) < 0.2, zipf(rng, items, sessions), next_)
    return rows, offsets


def zipf(rng: np.random.Generator, items: int, count: int) -> np.ndarray:
    return np.minimum(items ** rng.random(count), items - 1).astype(np.int32)  # the density falls as 1 / rank


def stand_in(items: int, sessions: int, content: bool = True) -> Any:
    """What `build_model` reads of a run's inputs."""
    rows, offsets = draw_log(items, sessions)
    vectors = np.random.default_rng(2).normal(size=(items, CONTENT)).astype(np.float32) if content else None
    split = SimpleNamespace(train=SimpleNamespace(rows=rows, offsets=offsets))
    return SimpleNamespace(content=vectors, catalog=range(items), split=split, counts=np.bincount(rows, minlength=items))


class Ours:
    """A model of `sbr.models` in training, a step at a time, as `tpad train-sbr` trains it."""

    def __init__(self, name: str, config: Config, inputs: Any, accelerator: Any, epochs: int = 1000) -> None:
        self.model = build_model(name, 0, config, inputs).to(accelerator.device)
        self.settings = config.sbr.model_copy(update={"epochs": epochs})
        train, folder = inputs.split.train, Path(tempfile.mkdtemp())
        windows, checkpoints = pack(train.rows, train.offsets, PREFIX, PREFIX // 2), Checkpoints(folder / "checkpoints", "")
        self.training = Training(name, 0, self.model, self.settings, windows, inputs.counts, None, accelerator, folder, checkpoints)
        self.work = self.steps()

    def steps(self) -> Iterator[int]:
        """Cases of each step."""
        windows = self.training.windows
        for epoch in range(self.settings.epochs):
            self.model.train()
            for step, which in enumerate(batches(len(windows), self.settings.batch, 0, epoch)):
                self.training.step(which, epoch, step)
                yield int(windows.cases[which].sum())


class Peer:
    """A model in training that makes a sample of each prefix, as that of its authors does; `first` is the row of item 0 in its scores."""

    def __init__(
        self, model: torch.nn.Module, first: int, batch: int, rate: Callable[[int], float], decay: float, inputs: Any, epochs: int
    ) -> None:
        self.device = next(model.parameters()).device
        self.model, self.first, self.batch, self.rate = model, first, batch, rate
        self.optimizer = torch.optim.Adam(model.parameters(), weight_decay=decay)
        self.prefixes, self.targets = samples_of(inputs.split.train.rows, inputs.split.train.offsets, PREFIX)
        self.epochs = epochs
        self.work = self.steps()

    def steps(self) -> Iterator[int]:
        for epoch in range(self.epochs):
            self.model.train()
            self.optimizer.param_groups[0]["lr"] = self.rate(epoch)
            for which in batches(len(self.prefixes), self.batch, 0, epoch):
                scores = self.model([self.prefixes[n] for n in which])
                targets = torch.as_tensor(self.targets[which] - 1 + self.first, device=self.device)
                loss = torch.nn.functional.cross_entropy(scores, targets)
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()
                yield len(which)

    def ranks(self, prefixes: list[list[int]], targets: np.ndarray) -> np.ndarray:
        """Of the targets (cases,), counted from 1, after the prefixes."""
        self.model.eval()
        found = []
        with torch.inference_mode():
            for part in (slice(n, n + 500) for n in range(0, len(targets), 500)):
                scores = self.model(prefixes[part])[:, self.first :]
                found.append(target_ranks(scores, torch.as_tensor(targets[part] - 1, device=self.device)).cpu().numpy())
        return np.concatenate(found)


def peers(chosen: argparse.Namespace, inputs: Any, device: torch.device, epochs: int = 1000) -> dict[str, Peer]:
    """The SR-GNN reference, and RecBole's SASRec where it is asked for; each with its own batch and learning rate."""
    torch.manual_seed(0)
    items, dim = len(inputs.catalog), chosen.dim
    reference = SRGNN(items, dim).to(device)
    found = {"SR-GNN reference": Peer(reference, 0, SRGNN_BATCH, lambda epoch: 1e-3 * 0.1 ** (epoch // 3), 1e-5, inputs, epochs)}
    if chosen.recbole:
        from recbole_sasrec import RecBoleSASRec

        model = RecBoleSASRec(items, dim, PREFIX, device).to(device)
        found["RecBole's SASRec"] = Peer(model, 1, RECBOLE_BATCH, lambda _: 1e-3, 0.0, inputs, epochs)
    return found


def rate(work: Iterator[int], seconds: float) -> float:
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        done += next(work)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # steps are launched ahead of the device
    return done / (time.perf_counter() - began)


def names(chosen: argparse.Namespace) -> list[str]:
    return [name for name in chosen.models.split(",") if name]


def settings(chosen: argparse.Namespace, *more: str) -> Config:
    return load_config(None, [f"sbr.dim={chosen.dim}", *more])


def train(chosen: argparse.Namespace) -> None:
    inputs, accelerator = stand_in(chosen.items, chosen.sessions), make_accelerator()
    others = peers(chosen, inputs, accelerator.device)
    work = {f"{name}, batch {peer.batch} samples": peer.work for name, peer in others.items()}
    for name, (batch, loss) in itertools.product(
        names(chosen), [(128, "auto"), (128, "softmax"), (100, "auto"), (100, "softmax"), (25, "auto")]
    ):
        ours = Ours(name, settings(chosen, f"sbr.batch={batch}", f"sbr.loss={loss}"), inputs, accelerator)
        work[f"{name}, batch {batch} sessions, {'all' if ours.training.share is None else ours.settings.negatives} items"] = ours.work
    for each in work.values():
        next(each)
    rounds = [{name: rate(each, chosen.seconds) for name, each in work.items()} for _ in range(chosen.rounds)]
    reference = next(iter(work))
    print("| training | cases a second | times the reference |\n| --- | --- | --- |")
    for name in work:
        ratio = statistics.median(each[name] / each[reference] for each in rounds)
        print(f"| {name} | {statistics.median(each[name] for each in rounds):,.0f} | {ratio:.2f} |")


def accuracy(chosen: argparse.Namespace) -> None:
    inputs, accelerator = stand_in(chosen.items, chosen.sessions), make_accelerator()
    rows, offsets = draw_log(chosen.items, 2000, seed=3)
    seconds, updates, found = {}, {}, {}
    prefixes, targets = samples_of(rows, offsets, PREFIX)
    for name, peer in peers(chosen, inputs, accelerator.device, chosen.epochs).items():
        began = time.perf_counter()
        steps = list(peer.work)
        cases, updates[name] = sum(steps), len(steps)
        seconds[name] = time.perf_counter() - began
        found[name] = summarise(peer.ranks(prefixes, targets))
    for name in names(chosen):
        ours = Ours(name, settings(chosen), inputs, accelerator, chosen.epochs)
        began = time.perf_counter()
        steps = list(ours.work)
        assert sum(steps) == cases
        updates[name] = len(steps)
        seconds[name] = time.perf_counter() - began
        found[name] = summarise(model_ranks(ours.model, pack(rows, offsets, PREFIX)))
    print(f"{chosen.epochs} epochs of {cases // chosen.epochs:,} cases, {len(targets):,} test cases")
    print("| model | HR@20 | MRR@20 | updates | seconds |\n| --- | --- | --- | --- | --- |")
    for name, metrics in found.items():
        print(f"| {name} | {metrics['HR@20']:.4f} | {metrics['MRR@20']:.4f} | {updates[name]:,} | {seconds[name]:.0f} |")


def evaluate(chosen: argparse.Namespace) -> None:
    inputs = stand_in(chosen.items, chosen.sessions)
    rows, offsets = draw_log(chosen.items, chosen.test, seed=3)
    windows = cases_of(SimpleNamespace(rows=rows, offsets=offsets, last_out=chosen.last), PREFIX)
    padded, found = prefixes_of(windows)
    prefixes, targets = [(line[line != PAD] + 1).tolist() for line in padded], found + 1
    work: dict[str, Callable[[], Any]] = {}
    for name in names(chosen):
        work[name] = partial(model_ranks, build_model(name, 0, settings(chosen), inputs), windows)
    for name, peer in peers(chosen, inputs, torch.device("cpu")).items():
        work[name] = partial(peer.ranks, prefixes, targets)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _, (name, ranks) in itertools.product(range(chosen.rounds), work.items()):
        began = time.perf_counter()
        ranks()
        seconds[name].append(time.perf_counter() - began)
    print(f"{windows.cases / chosen.test:.1f} cases a session, {chosen.items:,} items, {torch.get_num_threads()} threads")
    print("| ranking | cases a second | sessions a second |\n| --- | --- | --- |")
    for name, each in seconds.items():
        middle = statistics.median(each)
        print(f"| {name} | {windows.cases / middle:,.0f} | {chosen.test / middle:,.0f} |")


def memory(chosen: argparse.Namespace) -> None:
    began = time.perf_counter()
    inputs = stand_in(chosen.items, chosen.sessions, content=False)
    ours = Ours("ID-only", settings(chosen), inputs, make_accelerator())
    built = time.perf_counter() - began
    began, cases = time.perf_counter(), sum(itertools.islice(ours.work, chosen.steps))
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{chosen.items:,} items, {chosen.sessions:,} sessions, dim {chosen.dim}: peak memory {peak:.2f} GiB, {built:.0f} s to begin,")
    step = f"{ours.settings.batch} sessions a step, {seconds / chosen.steps:.2f} s"
    print(f"{step}; {cases / seconds:,.0f} cases a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands: dict[str, tuple[Callable[[argparse.Namespace], None], int, int, int, str]] = {
        "train": (train, 10_000, 10_000, 100, "ID-only,full,SASRec"),
        "accuracy": (accuracy, 1_000, 4_000, 100, "ID-only,SASRec"),
        "evaluate": (evaluate, 10_000, 20_000, 64, "ID-only,full"),
        "memory": (memory, 1_000_000, 1_000_000, 64, "ID-only"),
    }
    parts = parser.add_subparsers(dest="command", required=True)
    for name, (_, items, sessions, dim, models) in commands.items():
        part = parts.add_parser(name)
        for option, value in {
            "items": items,
            "sessions": sessions,
            "dim": dim,
            "rounds": 5,
            "epochs": 3,
            "test": 2000,
            "steps": 100,
        }.items():
            part.add_argument(f"--{option}", type=int, default=value)
        part.add_argument("--seconds", type=float, default=3.0, help="of a round")
        part.add_argument("--models", default=models)
        part.add_argument("--recbole", action="store_true")
        part.add_argument("--last", action="store_true", help="ranking: after the last event of each session alone, as last-out asks")
        part.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    commands[chosen.command][0](chosen)


if __name__ == "__main__":
    main()
