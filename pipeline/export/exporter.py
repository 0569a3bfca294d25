"""Computes the parts of an export: batches of items in, one Parquet file of vectors for each part out.

Worker processes load batches ahead of the model (`item_batches.py`). On a CPU the model computes several batches at a time, one a core,
since cores that share a batch mostly wait for each other; on a GPU two, each in its own stream. In an update, rows of unchanged content
are copied from the previous version, bit for bit (`unchanged_rows.py`). With a server (`server_engine.py`) a batch is a request, and
several are under way.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.core.config import ExportConfig
from pipeline.core.errors import ARTIFACT, UserError, note
from pipeline.core.prefetch import ahead, telling_of_dead_workers, workers_on
from pipeline.core.progress import Steps
from pipeline.data.catalog import Catalog
from pipeline.data.embeddings import HALVES, embeddings_schema, vector_columns
from pipeline.export.item_batches import Batch, ItemBatches
from pipeline.export.server_engine import EmbeddingServer
from pipeline.export.unchanged_rows import PreviousVersion
from pipeline.mllm.model import Mllm, SideBySide
from pipeline.mllm.token_batches import cut
from pipeline.mllm.vision_tower import pack_attention

LANES = 8  # largest number of batches computed at a time on a CPU; more cores than that share batches
GPU_LANES = 2  # the same on a GPU, each in its own stream: one is computed while the other is sent, launched or waited for
AHEAD = 65_536  # tokens loaded ahead of the model, at least a batch a worker: short texts with images take longer to load than to compute
MEASURED = 512  # rows in a piece to measure, so that several workers share the first part, for which the model waits
BEHIND = 4  # largest number of computed batches that wait to be written
REQUESTS = 16  # batches that are sent to a server at a time


@dataclass
class ExportStats:
    """Counts what this process did."""

    items: int = 0
    tokens: int = 0
    padded: int = 0  # tokens with their padding
    seconds: float = 0.0
    computing: float = 0.0  # of these, the model was running
    encoding: float = 0.0  # seconds of the workers, spent on texts and images ...
    decoding: float = 0.0  # ... of these, on images

    def __add__(self, other: "ExportStats") -> "ExportStats":
        return ExportStats(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def padding(self) -> float:
        """Share of padding in the computed tokens."""
        return 1 - self.tokens / max(self.padded, 1)


def is_part(path: Path, catalog: Catalog, rows: np.ndarray, skips: bool) -> bool:
    """Returns whether the file is a complete part of these rows; `skips`: items with bad images may be absent."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            item_ids = file.read()["item_id"].to_pylist()
    except (OSError, pa.ArrowException):
        return False
    wanted, present = [catalog.item_ids[row] for row in rows], set(item_ids)
    return bool(item_ids == wanted or (skips and item_ids == [item for item in wanted if item in present]))


@dataclass
class PartInProgress:
    """A part that is being computed, with the results of its batches so far."""

    name: str
    rows: np.ndarray
    contents: np.ndarray  # (n, 32) uint8, sha256 of the content shown to the model
    unchanged: np.ndarray  # (n,) bool: same content as in the previous version
    vectors: dict[str, np.ndarray]  # (n, D) float32 each
    left: int  # batches to come
    n_tokens: np.ndarray
    has_image: np.ndarray
    has_text: np.ndarray
    computed: np.ndarray  # (n,) bool: neither unchanged nor skipped


class Computed(NamedTuple):
    """The vectors of a batch, by "items.HALF", and when they were begun and are ready: seconds, or events in the stream of a GPU."""

    out: dict[str, Tensor]
    began: Any
    ended: Any


Running = tuple[PartInProgress, Batch, "Future[Computed]"]


class Exporter:
    """Computes parts of one export, and hands each to `add`. `server`: takes the place of the model's forward pass."""

    def __init__(
        self,
        config: ExportConfig,
        add: Callable[[str, pa.Table], None],
        parts: dict[str, np.ndarray],
        source: ItemBatches,
        mllm: Mllm | SideBySide,
        previous: PreviousVersion | None,
        dim: int,
        halves: Sequence[str] = HALVES,
        server: EmbeddingServer | None = None,
    ) -> None:
        self.add, self.parts, self.source, self.previous, self.dim, self.halves = add, parts, source, previous, dim, halves
        self.schema = embeddings_schema(dim, config.dtype, halves)
        self.workers = config.workers
        self.server = server
        self.device = torch.device("cpu") if server else own_device()
        self.threads = torch.get_num_threads()
        # torch.compile traces a model by replacing functions of all threads, so only one thread may run it
        lanes = 1 if config.compile else GPU_LANES if self.device.type == "cuda" else min(LANES, self.threads)
        self.lanes = REQUESTS if server else lanes
        self.mllm = mllm.to(self.device).eval()
        for module in self.mllm.modules():
            if isinstance(module, Mllm):
                pack_attention(module.backbone, self.device)
                if config.compile:
                    compile_layers(module.backbone.model, self.device)
        self.stats = ExportStats()

    def run(self, names: Sequence[str], show: bool = True) -> None:
        """Computes the parts `names`. `show`: shows the progress."""
        start = time.perf_counter()
        model = ThreadPoolExecutor(self.lanes, initializer=own_stream, initargs=(self.device,))
        pool = workers_on(self.source, self.workers)
        torch.set_num_threads(max(1, self.threads // self.lanes))  # of each lane
        try:
            total = sum(len(self.parts[name]) for name in names)
            with telling_of_dead_workers("export.workers"), Steps("export", total, show=show) as progress:
                for part, batch, computed in self._running(pool, model, names):
                    self._collect(part, batch, computed.result())
                    progress.advance(f"{self.stats.padding:.1%} padding", by=len(batch.positions))
        finally:
            for executor in (model, pool):
                executor.shutdown(cancel_futures=True)
            torch.set_num_threads(self.threads)
        self.stats.seconds += time.perf_counter() - start

    def _running(self, pool: Executor, model: Executor, names: Sequence[str]) -> Iterator[Running]:
        """Yields the batches of the parts `names` in order, each when it is computed or `BEHIND` others have been computed meanwhile."""
        running: deque[Running] = deque()

        def idle() -> bool:  # the lanes have little work left, so that loaded batches should not be held back
            return sum(not computed.done() for *_, computed in running) < self.lanes + BEHIND // 2

        for part, batch in self._loaded_batches(pool, names, idle):
            running.append((part, batch, model.submit(self._forward, part, batch)))
            while running and (len(running) > self.lanes + BEHIND or running[0][2].done()):
                yield running.popleft()
        yield from running

    def _loaded_batches(self, pool: Executor, names: Sequence[str], idle: Callable[[], bool]) -> Iterator[tuple[PartInProgress, Batch]]:
        """Yields the batches of the parts `names`, in two stages, each of which runs ahead of the next one:

        1. measure: hash the content of each row and count its tokens, in `pool`, in pieces; cut the measured part into batches;
        2. load: decode, tokenise and collate each batch, in `pool`.
        """

        def pieces() -> Iterator[tuple[tuple[str, bool], tuple[np.ndarray, np.ndarray]]]:
            for name in names:
                rows, known = self.parts[name], self._known_contents(name)
                for first in range(0, len(rows), MEASURED):
                    piece = slice(first, first + MEASURED)
                    yield (name, piece.stop >= len(rows)), (rows[piece], known[piece])

        def measured() -> Iterator[tuple[PartInProgress, tuple[np.ndarray, np.ndarray]]]:
            done: list[tuple[np.ndarray, np.ndarray]] = []  # of the current part
            for (name, last), piece in ahead(pool, ItemBatches.measure, pieces(), pieces_ahead):
                done.append(piece)
                if last:
                    contents, lengths = map(np.concatenate, zip(*done, strict=True))
                    done = []
                    part, batches = self._begin_part(name, contents, lengths)
                    for positions in batches:
                        yield part, (part.rows, positions)

        pieces_ahead = -(-max(map(len, self.parts.values()), default=0) // MEASURED)
        batches_ahead = max(AHEAD // self.source.token_budget, self.workers + self.lanes)
        yield from ahead(pool, ItemBatches.load, measured(), batches_ahead, idle)

    def _begin_part(self, name: str, contents: np.ndarray, lengths: np.ndarray) -> tuple[PartInProgress, list[np.ndarray]]:
        """Returns a measured part and its batches, as positions (B,) in the part. One without batches is written at once."""
        n, fresh = len(lengths), np.flatnonzero(lengths)
        batches = [fresh[batch] for batch in cut(lengths[fresh], self.source.token_budget)]
        vectors = {half: np.zeros((n, self.dim), np.float32) for half in self.halves}
        flags = (np.zeros(n, bool) for _ in range(3))
        part = PartInProgress(name, self.parts[name], contents, lengths == 0, vectors, len(batches), np.zeros(n, np.int32), *flags)
        if not batches:
            self._finish(part)
        return part, batches

    def _known_contents(self, name: str) -> np.ndarray:
        """Returns the content hashes (n, 32) of the part's rows in the previous version; zeros for rows that it lacks."""
        rows = self.parts[name]
        return np.zeros((len(rows), 32), np.uint8) if self.previous is None else self.previous.contents_of(rows)

    def _forward(self, part: PartInProgress, batch: Batch) -> Computed:
        """Computes the vectors of a batch, in a lane."""
        began, out = moment(self.device), {}
        with torch.inference_mode():
            if self.server and len(batch.positions):
                out = self.server.vectors(part.rows[batch.positions], batch)
            elif len(batch.positions):
                tensors = {name: on_device(group, self.device) for name, group in batch.tensors.items()}
                out = self.mllm(tensors, {"items": self.halves})
        return Computed(out, began, moment(self.device))

    def _collect(self, part: PartInProgress, batch: Batch, computed: Computed) -> None:
        """Copies the vectors of a batch into its part, and writes the part after its last batch."""
        out = computed.out
        self.stats.items += len(batch.positions)
        self.stats.tokens += int(batch.n_tokens.sum())
        self.stats.padded += batch.tensors["items"]["input_ids"].numel() if len(batch.positions) else 0
        self.stats.computing += seconds_between(computed.began, computed.ended) / self.lanes
        self.stats.encoding += batch.seconds
        self.stats.decoding += batch.decoding
        for fault in batch.faults:
            note(f"warning: {fault}; {'left out' if self.source.on_bad_image == 'skip' else 'shown as text only'}")
        for half in self.halves if out else ():
            values = out[f"items.{half}"].cpu().numpy()
            if not (finite := np.isfinite(values).all(1)).all():
                item = self.source.catalog.item_ids[part.rows[batch.positions[int(np.argmin(finite))]]]
                raise UserError(f"the MLLM gives features that are not finite (item {item}); run `tpad distill --fresh`", ARTIFACT)
            part.vectors[half][batch.positions] = values
        part.n_tokens[batch.positions], part.computed[batch.positions] = batch.n_tokens, True
        part.has_image[batch.positions], part.has_text[batch.positions] = batch.has_image, batch.has_text
        part.left -= 1
        if not part.left:
            self._finish(part)

    def _finish(self, part: PartInProgress) -> None:
        """Writes a part: computed rows and rows of the previous version, in catalogue order; skipped rows are left out."""
        computed = np.flatnonzero(part.computed)
        columns = {
            "item_id": pa.array([self.source.catalog.item_ids[row] for row in part.rows[computed]], pa.string()),
            "has_image": part.has_image[computed],
            "has_text": part.has_text[computed],
            "n_tokens": part.n_tokens[computed],
            "content_sha256": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), len(computed), [None, pa.py_buffer(part.contents[computed].tobytes())]
            ),
        }
        for half, values in part.vectors.items():
            columns |= vector_columns(half, values[computed], self.schema)
        table = pa.table({name: columns[name] for name in self.schema.names}, schema=self.schema)
        if self.previous is not None and part.unchanged.any():
            unchanged = np.flatnonzero(part.unchanged)
            order = np.argsort(np.concatenate([computed, unchanged]))
            table = pa.concat_tables([table, self.previous.take(part.rows[unchanged], self.schema)]).take(order)
        self.add(part.name, table)


def own_device() -> torch.device:
    """Returns the accelerator of this process; the CPU where there is none, or under `accelerate launch --cpu`."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or os.environ.get("ACCELERATE_USE_CPU") == "True":
        return torch.device("cpu")
    return torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def compile_layers(model: Any, device: torch.device) -> None:
    """Applies torch.compile to every repeated layer, so that layers of one kind are compiled once.

    On a CPU only to those of the language model: a Qwen tower would be compiled again for every number of images.
    """
    for lists in (model if device.type == "cuda" else model.get_decoder()).modules():
        for layer in lists if isinstance(lists, torch.nn.ModuleList) else ():
            layer.compile(dynamic=True)


def own_stream(device: torch.device) -> None:
    """Gives the calling thread its own stream, on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # until the weights are loaded
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def moment(device: torch.device) -> Any:
    """Returns the time in seconds; on a GPU an event in the current stream, which runs behind its thread."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(began: Any, ended: Any) -> float:
    """Returns the seconds between two moments; waits for an event to come."""
    if isinstance(began, float):
        return float(ended - began)
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000


def on_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies tensors to the device; to a GPU from pinned memory, without waiting."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}
