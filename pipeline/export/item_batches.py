"""What the export feeds the model: rows measured, cut into batches by real tokens, decoded and tokenised ahead of it.

Two jobs, so that nothing is decoded before its turn: `measure` takes the lengths of rows (tokens of the text, grid of the
picture), by which a part is `cut` into batches; `load` decodes and collates one batch. All are functions of the rows alone,
in whatever process they run, and so are the bytes of a part.
"""

import hashlib
import multiprocessing
import os
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.core.process import end_with
from pipeline.data.catalog import Catalog
from pipeline.data.images import ImageError
from pipeline.mllm.processor import Encoded, PromptProcessor
from pipeline.mllm.prompts import Prompts, View


@dataclass(frozen=True)
class Batch:
    """`at` (B,) positions in the part, without those of pictures that cannot be decoded, where these are skipped."""

    at: np.ndarray
    tensors: dict[str, dict[str, Tensor]]  # as `Mllm` takes them
    n_tokens: np.ndarray  # (B,)
    has_image: np.ndarray  # (B,) bool
    has_text: np.ndarray  # (B,) bool
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0  # it took to encode ...
    decoding: float = 0.0  # ... of which on pictures


@dataclass
class ItemBatches:
    """The items as the model is shown them."""

    catalog: Catalog
    views: Prompts  # that takes every picture for decodable: it turns out when its batch is loaded
    processor: PromptProcessor
    token_budget: int
    on_bad_image: Literal["error", "skip", "text_only"]
    round_to: int = 1  # lengths are padded to multiples of this

    def measure(self, rows: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Contents (n, 32), and how many tokens the rows have that must be computed; zero where the content is as in `known` (n, 32),
        that of the version which is updated (zeros where it has none)."""
        contents = np.stack([self._content(int(row)) for row in rows])
        fresh = ~(contents == known).all(1)
        lengths = [self.processor.length(self.views.item(int(row))) if new else 0 for row, new in zip(rows, fresh, strict=True)]
        return contents, np.array(lengths, np.int64)

    def _content(self, row: int) -> np.ndarray:
        text = self.views.text(row).encode()
        try:
            image = self.catalog.image_bytes(row)
        except ImageError:  # a file that is not there: `load` says so, and does as it is told
            if self.on_bad_image == "error":
                raise
            image = None
        lacks = not text or image is None or self.on_bad_image == "text_only"  # or may turn out to
        similar = self.views.similar(row).encode() if lacks else b""
        sizes = b"%d %d " % (len(text), -1 if image is None else len(image))
        digest = hashlib.sha256(sizes + text + (image or b"") + similar).digest()
        return np.frombuffer(digest, np.uint8)

    def load(self, rows: np.ndarray, at: np.ndarray) -> Batch:
        began, before = time.perf_counter(), self.processor.images.seconds
        found: list[tuple[int, Encoded, bool, bool]] = []
        faults = []
        for place in at.tolist():
            row = int(rows[place])
            view, shown = View(image=self.catalog.has_image(row), text=True), None
            try:
                shown = self.processor.encode(self.views.item(row, view))
            except ImageError as error:
                if self.on_bad_image == "error":
                    raise
                faults.append(str(error))
                if self.on_bad_image == "text_only":
                    view = View(image=False, text=True)
                    shown = self.processor.encode(self.views.item(row, view))
            if shown is not None:
                found.append((place, shown, view.image, bool(self.views.text(row))))
        if not found:
            return Batch(np.empty(0, np.int64), {}, np.empty(0, np.int32), np.empty(0, bool), np.empty(0, bool), faults)
        places, sequences, has_image, has_text = zip(*found, strict=True)
        tensors = self.processor.collate({"items": sequences}, self.round_to)
        del tensors["items"]["attention_mask"]  # padding is on the right and attention causal: no token ever looks at it
        n_tokens = np.array([len(shown) for shown in sequences], np.int32)
        seconds, decoding = time.perf_counter() - began, self.processor.images.seconds - before
        return Batch(np.array(places), tensors, n_tokens, np.array(has_image), np.array(has_text), faults, seconds, decoding)


# --- work ahead of the model


_source: ItemBatches | None = None  # of a worker


def measure(rows: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert _source is not None
    return _source.measure(rows, known)


def load(rows: np.ndarray, at: np.ndarray) -> Batch:
    assert _source is not None
    return _source.load(rows, at)


def _begin(source: ItemBatches, parent: int | None) -> None:
    global _source
    _source = source
    if parent is not None:
        torch.set_num_threads(1)
        end_with(parent)


def loader(source: ItemBatches, workers: int) -> Executor:
    """Where `measure` and `load` run: so many processes, or a thread of this one."""
    if workers == 0:
        return ThreadPoolExecutor(1, initializer=_begin, initargs=(source, None))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (source, os.getpid()))
    pool.submit(int).result()  # forks them now, before there is a busy device
    return pool
