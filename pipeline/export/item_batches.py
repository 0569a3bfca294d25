"""Prepares the input of the export: measures items, and loads batches of them ahead of the model.

Two jobs, so that no image is decoded before its batch is due. `measure` hashes the content of rows and counts their tokens (from
the text and the image's size), by which a part is cut into batches; `load` decodes, tokenises and collates one batch. Both are
functions of the rows alone, whichever process runs them, and so the bytes of a part are too.
"""

import hashlib
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from pipeline.data.catalog import Catalog
from pipeline.data.images import ImageError
from pipeline.mllm.processor import Encoded, PromptProcessor
from pipeline.mllm.prompts import Prompts, View
from pipeline.mllm.vector_prompts import VectorProcessor


@dataclass(frozen=True)
class Batch:
    """A loaded batch of B items of one part; without items whose image cannot be decoded, if these are skipped."""

    positions: np.ndarray  # (B,) in the part
    tensors: dict[str, dict[str, Tensor]]  # input of `Mllm`
    n_tokens: np.ndarray  # (B,)
    has_image: np.ndarray  # (B,) bool
    has_text: np.ndarray  # (B,) bool
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0  # spent on loading ...
    decoding: float = 0.0  # ... of these, on images


@dataclass
class ItemBatches:
    """Measures and loads the items of a catalogue, as the model is shown them."""

    catalog: Catalog
    prompts: Prompts  # takes every image as decodable: `load` finds those that are not
    processor: PromptProcessor
    token_budget: int
    on_bad_image: Literal["error", "skip", "text_only"]
    round_to: int = 1  # lengths are padded to multiples of this

    def measure(self, rows: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the content hashes (n, 32) of n rows and their lengths in tokens (n,).

        The length is 0 where the hash equals that in `known` (n, 32), the content of the previous version (zeros where it has none).
        """
        contents = np.stack([self._content(int(row)) for row in rows])
        fresh = ~(contents == known).all(1)
        lengths = [self.processor.length(self.prompts.item(int(row))) if new else 0 for row, new in zip(rows, fresh, strict=True)]
        return contents, np.array(lengths, np.int64)

    def _content(self, row: int) -> np.ndarray:
        """Returns the sha256 (32,) of text, image bytes and, for an incomplete item, its neighbours' titles; or of the item's vector."""
        if isinstance(self.processor, VectorProcessor):
            return np.frombuffer(self.processor.content(row), np.uint8)
        text = self.prompts.text(row).encode()
        try:
            image = self.catalog.image_bytes(row)
        except ImageError:  # the file is missing: `load` reports it, and skips the item or its image
            if self.on_bad_image == "error":
                raise
            image = None
        lacks = not text or image is None or self.on_bad_image == "text_only"  # or its image may turn out to be bad
        similar = self.prompts.similar(row).encode() if lacks else b""
        sizes = b"%d %d " % (len(text), -1 if image is None else len(image))
        digest = hashlib.sha256(sizes + text + (image or b"") + similar).digest()
        return np.frombuffer(digest, np.uint8)

    def load(self, rows: np.ndarray, positions: np.ndarray) -> Batch:
        """Decodes, tokenises and collates the items at `positions` (B,) of a part's `rows`."""
        start, before = time.perf_counter(), self.processor.images.seconds
        loaded: list[tuple[int, Encoded, bool, bool]] = []
        faults = []
        for position in positions.tolist():
            row = int(rows[position])
            view, sequence = View(image=self.catalog.has_image(row), text=True), None
            try:
                sequence = self.processor.encode(self.prompts.item(row, view))
            except ImageError as error:
                if self.on_bad_image == "error":
                    raise
                faults.append(str(error))
                if self.on_bad_image == "text_only":
                    view = View(image=False, text=True)
                    sequence = self.processor.encode(self.prompts.item(row, view))
            if sequence is not None:
                loaded.append((position, sequence, view.image, bool(self.prompts.text(row))))
        if not loaded:
            return Batch(np.empty(0, np.int64), {}, np.empty(0, np.int32), np.empty(0, bool), np.empty(0, bool), faults)
        shown, sequences, has_image, has_text = zip(*loaded, strict=True)
        tensors = self.processor.collate({"items": sequences}, self.round_to)
        del tensors["items"]["attention_mask"]  # padding is on the right and attention is causal, so no token attends to it
        n_tokens = np.array([len(sequence) for sequence in sequences], np.int32)
        seconds, decoding = time.perf_counter() - start, self.processor.images.seconds - before
        return Batch(np.array(shown), tensors, n_tokens, np.array(has_image), np.array(has_text), faults, seconds, decoding)
