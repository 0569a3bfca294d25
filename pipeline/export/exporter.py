"""The parts of an export computed: batches in, vectors out, one Parquet file each.

`item_batches.py` reads ahead of the model, and a thread behind it takes the vectors off the device and writes. On a CPU the
model computes several batches at a time, a core each: cores that share one batch mostly wait for each other; on a GPU two, each
in a stream of its own. Where a version is updated, rows of unchanged content are taken from it, bit for bit.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.core.config import ExportConfig
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.core.prefetch import ahead
from pipeline.core.progress import Steps
from pipeline.data.catalog import Catalog
from pipeline.data.embeddings import HALVES, embeddings_schema, vector_columns
from pipeline.export.item_batches import Batch, ItemBatches, load, loader, measure
from pipeline.export.part_claims import PartClaims
from pipeline.export.unchanged_rows import PreviousVersion
from pipeline.mllm.model import Mllm, SideBySide
from pipeline.mllm.token_batches import cut
from pipeline.mllm.vision_tower import pack_attention

LANES = 8  # batches the model computes at a time on a CPU, at most: more cores than that share batches
GPU_LANES = 2  # and on a GPU, each in a stream of its own: it computes one while the other is sent, launched or waited for
AHEAD = 65_536  # tokens read ahead of it, or a batch a worker: long texts are read faster than computed, short ones with pictures slower
MEASURED = 512  # rows measured at a time, so that several workers share the first part, for which the model waits
BEHIND = 4  # batches not yet written, at most, beside those in the lanes
WAIT_SECONDS = 0.1  # between looks at the last parts, which other processes have in hand


@dataclass
class ExportStats:
    """What this process did."""

    items: int = 0
    tokens: int = 0
    padded: int = 0  # tokens with their padding
    seconds: float = 0.0
    computing: float = 0.0  # of these, the model was at work
    encoding: float = 0.0  # seconds of the workers, at texts and pictures ...
    decoding: float = 0.0  # ... of which at pictures

    @property
    def padding(self) -> float:
        """The share of the computed tokens that was padding."""
        return 1 - self.tokens / max(self.padded, 1)


def is_part(path: Path, catalog: Catalog, rows: np.ndarray, skips: bool) -> bool:
    """Whether an interrupted export of the same fingerprint, or another process, left this part whole."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            found = file.read()["item_id"].to_pylist()
    except (OSError, pa.ArrowException):
        return False
    wanted, there = [catalog.item_ids[row] for row in rows], set(found)
    return bool(found == wanted or (skips and found == [item for item in wanted if item in there]))


@dataclass
class PartInProgress:
    """A part on its way: what its batches have given so far."""

    name: str
    rows: np.ndarray
    contents: np.ndarray  # (n, 32) uint8, sha256 of what the model is shown of an item
    kept: np.ndarray  # (n,) bool: content as in the version that is updated
    vectors: dict[str, np.ndarray]  # (n, D) float32 each
    left: int  # batches
    n_tokens: np.ndarray
    has_image: np.ndarray
    has_text: np.ndarray
    computed: np.ndarray  # (n,) bool: neither kept nor skipped


class Writer:
    """A thread behind the model. `put` waits while more than `behind` are on their way, and raises what went wrong there."""

    def __init__(self, behind: int, device: torch.device) -> None:
        self.pool, self.behind = ThreadPoolExecutor(1, initializer=own_stream, initargs=(device,)), behind
        self.begun: deque[Future[None]] = deque()

    def put(self, work: Callable[..., None], *arguments: Any) -> None:
        self.begun.append(self.pool.submit(work, *arguments))
        while len(self.begun) > self.behind or (self.begun and self.begun[0].done()):
            self.begun.popleft().result()

    def waiting(self) -> int:
        return sum(not each.done() for each in self.begun)

    def drain(self) -> None:
        while self.begun:
            self.begun.popleft().result()


class ModelClock:
    """How long the model was at work, a lane: on a GPU by events in its stream, which runs behind the thread that feeds it."""

    def __init__(self, device: torch.device, lanes: int) -> None:
        self.spans: list[tuple[Any, Any]] = []
        self.device, self.lanes, self.told = device, lanes, 0.0
        self.lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        began = self._now()
        yield
        with self.lock:
            self.spans.append((began, self._now()))
            if len(self.spans) > 1000:  # the early ones are long over
                self.told += self._sum(self.spans[:500])
                self.spans = self.spans[500:]

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _sum(self, spans: list[tuple[Any, Any]]) -> float:
        if self.device.type != "cuda":
            return float(sum(end - begin for begin, end in spans))
        return float(sum(begin.elapsed_time(end) for begin, end in spans)) / 1000

    def seconds(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (self.told + self._sum(self.spans)) / self.lanes


class Exporter:
    """The parts of one export, as far as this process computes them."""

    def __init__(
        self,
        config: ExportConfig,
        claims: PartClaims,
        parts: dict[str, np.ndarray],
        source: ItemBatches,
        mllm: Mllm | SideBySide,
        base: PreviousVersion | None,
        dim: int,
        halves: Sequence[str] = HALVES,
    ) -> None:
        self.claims, self.parts, self.source, self.base, self.dim, self.halves = claims, parts, source, base, dim, halves
        self.schema = embeddings_schema(dim, config.dtype, halves)
        self.workers = config.workers
        self.device = own_device()
        self.threads = torch.get_num_threads()
        # torch.compile looks into a model by replacing what all threads call, so no other may run the model meanwhile
        self.lanes = 1 if config.compile else GPU_LANES if self.device.type == "cuda" else min(LANES, self.threads)
        self.mllm = mllm.to(self.device).eval()
        for each in self.mllm.modules():
            if isinstance(each, Mllm):
                pack_attention(each.backbone, self.device)
                if config.compile:
                    compile_layers(each.backbone.model, self.device)
        self.writer = Writer(self.lanes + BEHIND, self.device)
        self.model = ThreadPoolExecutor(self.lanes, initializer=own_stream, initargs=(self.device,))
        self.clock = ModelClock(self.device, self.lanes)
        self.work = ExportStats()

    def run(self, names: list[str], wait: bool) -> None:
        """Computes what nobody else computes, until all parts are there, or, without `wait`, until others have the rest in hand."""
        began = time.perf_counter()
        total = sum(len(self.parts[name]) for name in names)
        pool = loader(self.source, self.workers)
        depth = max(AHEAD // self.source.token_budget, self.workers + self.lanes)
        torch.set_num_threads(self.threads // self.lanes)  # of each lane
        try:
            with Steps("export", total, self._done(names)) as progress:
                while self.claims.left(names):
                    before = self.work.items
                    for part, batch in ahead(pool, load, self._batches(pool, names), depth, self._idle):
                        self._compute(part, batch)
                        progress.advance(f"{self.work.padding:.1%} padding", by=len(batch.at))
                    self.writer.drain()
                    progress.advance(by=self._done(names) - progress.done)
                    if self.work.items == before:
                        if not wait:
                            break
                        time.sleep(WAIT_SECONDS)
        finally:
            for each in (self.model, self.writer.pool, pool):
                each.shutdown(cancel_futures=True)
            torch.set_num_threads(self.threads)
        self.work.seconds, self.work.computing = time.perf_counter() - began, self.clock.seconds()

    def _idle(self) -> bool:
        """Less is in the lanes, or waits for them, than they could do with."""
        return self.writer.waiting() < self.lanes + BEHIND // 2

    def _done(self, names: list[str]) -> int:
        left = set(self.claims.left(names))
        return sum(len(self.parts[name]) for name in names if name not in left)

    def _batches(self, pool: Executor, names: list[str]) -> Iterator[tuple[PartInProgress, tuple[np.ndarray, np.ndarray]]]:
        """The batches of the parts that this process claims, as arguments of `load`."""
        pieces = -(-max(map(len, self.parts.values()), default=0) // MEASURED)
        measured: list[tuple[np.ndarray, np.ndarray]] = []  # of the part that is being put together
        for (name, last), piece in ahead(pool, measure, self._pieces(names), pieces):
            measured.append(piece)
            if not last:
                continue
            contents, lengths = map(np.concatenate, zip(*measured, strict=True))
            measured = []
            at = np.flatnonzero(lengths)
            batches = [at[batch] for batch in cut(lengths[at], self.source.token_budget)]
            rows, n = self.parts[name], len(lengths)
            vectors = {half: np.zeros((n, self.dim), np.float32) for half in self.halves}
            flags = (np.zeros(n, bool) for _ in range(3))
            part = PartInProgress(name, rows, contents, lengths == 0, vectors, len(batches), np.zeros(n, np.int32), *flags)
            if not batches:
                self.writer.put(self._finish, part)
            for at in batches:
                yield part, (rows, at)

    def _pieces(self, names: list[str]) -> Iterator[tuple[tuple[str, bool], tuple[np.ndarray, np.ndarray]]]:
        """The rows of the parts that this process claims, as arguments of `measure`, and whether they are the last of their part."""
        for name in self.claims.take(names):
            rows, known = self.parts[name], self._known(name)
            for first in range(0, len(rows), MEASURED):
                piece = slice(first, first + MEASURED)
                yield (name, piece.stop >= len(rows)), (rows[piece], known[piece])

    def _known(self, name: str) -> np.ndarray:
        rows = self.parts[name]
        return np.zeros((len(rows), 32), np.uint8) if self.base is None else self.base.contents_of(rows)

    def _compute(self, part: PartInProgress, batch: Batch) -> None:
        self.work.items += len(batch.at)
        self.work.tokens += int(batch.n_tokens.sum())
        self.work.padded += batch.tensors["items"]["input_ids"].numel() if len(batch.at) else 0
        self.work.encoding += batch.seconds
        self.work.decoding += batch.decoding
        for fault in batch.faults:
            print(f"warning: {fault}; {'left out' if self.source.on_bad_image == 'skip' else 'shown as text only'}", file=sys.stderr)
        self.writer.put(self._collect, part, batch, self.model.submit(self._forward, batch))

    def _forward(self, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        """The vectors, and on a GPU the event after which they are there."""
        if not len(batch.at):
            return {}, None
        with self.clock.running(), torch.inference_mode():
            tensors = {of: on_device(found, self.device) for of, found in batch.tensors.items()}
            out: dict[str, Tensor] = self.mllm(tensors, {"items": self.halves})
        return out, torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None

    # what follows runs in the writer's thread

    def _collect(self, part: PartInProgress, batch: Batch, computed: "Future[tuple[dict[str, Tensor], Any]]") -> None:
        out, there = computed.result()
        if there is not None:
            there.synchronize()
        for half in self.halves if out else ():
            values = out[f"items.{half}"].cpu().numpy()
            if not (finite := np.isfinite(values).all(1)).all():
                item = self.source.catalog.item_ids[part.rows[batch.at[int(np.argmin(finite))]]]
                raise UserError(f"the MLLM gives features that are not finite (item {item}); run `tpad distill --fresh`", ARTIFACT)
            part.vectors[half][batch.at] = values
        part.n_tokens[batch.at], part.has_image[batch.at], part.has_text[batch.at] = batch.n_tokens, batch.has_image, batch.has_text
        part.computed[batch.at] = True
        part.left -= 1
        if not part.left:
            self._finish(part)

    def _finish(self, part: PartInProgress) -> None:
        at = np.flatnonzero(part.computed)
        columns = {
            "item_id": pa.array([self.source.catalog.item_ids[row] for row in part.rows[at]], pa.string()),
            "has_image": part.has_image[at],
            "has_text": part.has_text[at],
            "n_tokens": part.n_tokens[at],
            "content_sha256": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), len(at), [None, pa.py_buffer(part.contents[at].tobytes())]
            ),
        }
        for half, values in part.vectors.items():
            columns |= vector_columns(half, values[at], self.schema)
        table = pa.table({name: columns[name] for name in self.schema.names}, schema=self.schema)
        if self.base is not None and part.kept.any():
            kept = np.flatnonzero(part.kept)
            order = np.argsort(np.concatenate([at, kept]))
            table = pa.concat_tables([table, self.base.take(part.rows[kept], self.schema)]).take(order)
        self.claims.add(part.name, table)


def own_device() -> torch.device:
    """The accelerator of this process; the CPU where there is none, or `accelerate launch --cpu` says so."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or os.environ.get("ACCELERATE_USE_CPU") == "True":
        return torch.device("cpu")
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def compile_layers(model: Any, device: torch.device) -> None:
    """torch.compile for every layer that repeats: compiled once for all of its kind. On a CPU, where a Qwen tower is another program
    for every number of pictures, those of the language model alone."""
    for lists in (model if device.type == "cuda" else model.get_decoder()).modules():
        for layer in lists if isinstance(lists, torch.nn.ModuleList) else ():
            layer.compile(dynamic=True)


def own_stream(device: torch.device) -> None:
    """Of this thread, on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the weights are there
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def on_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
