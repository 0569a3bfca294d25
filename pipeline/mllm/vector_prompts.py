"""Shows items by vectors of the user's own: prompts of one token, and their batches, for the backbone `vectors`."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from pipeline.core.config import BackboneConfig
from pipeline.data.catalog import Catalog
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.item_images import IMAGE_CACHE_BYTES
from pipeline.mllm.item_vectors import VECTORS
from pipeline.mllm.processor import Encoded, PromptProcessor
from pipeline.mllm.prompts import FULL, READ, PromptPart, Prompts, View
from pipeline.mllm.vision_cache import VisionCache


class VectorPrompts(Prompts):
    """Prompts that show an item by its vector."""

    def item(self, row: int, view: View = FULL) -> list[PromptPart]:
        return [PromptPart("vector", row=row), READ]

    def knowledge(self, row: int, view: View, rng: np.random.Generator) -> list[PromptPart]:
        return self.item(row)

    def pair(self, row: int, rng: np.random.Generator) -> tuple[View, View]:
        return FULL, FULL

    def dropped(self, row: int, text: float, image: float, rng: np.random.Generator) -> View:
        return FULL


class VectorProcessor(PromptProcessor):
    """Batches item vectors as `PromptProcessor` batches token sequences. There are no texts to tokenise, and no images."""

    def __init__(self, vectors: np.ndarray, catalog: Catalog) -> None:
        self.vectors, self.catalog = vectors, catalog
        self.images = SimpleNamespace(seconds=0.0)  # type: ignore[assignment]  # nothing is decoded

    def encode(self, parts: Iterable[PromptPart]) -> Encoded:
        return Encoded(ids=[part.row for part in parts if part.kind == "vector"], reads=[range(1)])

    def length(self, parts: Iterable[PromptPart]) -> int:
        return 1

    def content(self, row: int) -> bytes:
        """Returns what identifies an item's content: the sha256 of its vector."""
        return hashlib.sha256(self.vectors[row].tobytes()).digest()

    def collate(self, batches: Mapping[str, Sequence[Encoded]], round_to: int = 1) -> dict[str, dict[str, Tensor]]:
        out: dict[str, dict[str, Tensor]] = {"images": {}}
        for name, sequences in batches.items():
            rows = [sequence.ids[0] for sequence in sequences]
            none = torch.empty(0, dtype=torch.int64)
            positions = {"read_at": torch.arange(len(rows)), "read_over": torch.ones(len(rows), dtype=torch.int64)}
            tokens = {"input_ids": torch.zeros(len(rows), 1, dtype=torch.int64), "attention_mask": torch.ones(len(rows), 1)}
            empty = dict.fromkeys(("answer_at", "answers", "intent_at", "intents", "image_at"), none)
            vectors = torch.from_numpy(self.vectors[rows])[:, None]
            out[name] = tokens | positions | empty | {"vectors": vectors}
        return out


def prompts_for(config: BackboneConfig) -> type[Prompts]:
    """Returns what builds the prompts that the backbone takes."""
    return VectorPrompts if config.name == VECTORS else Prompts


def processor_for(
    config: BackboneConfig,
    backbone: Backbone,
    catalog: Catalog,
    cache_bytes: int = IMAGE_CACHE_BYTES,
    vision_cache: VisionCache | None = None,
) -> PromptProcessor:
    """Returns what turns these prompts into the backbone's input; the other arguments are those of `PromptProcessor`."""
    if config.name == VECTORS:
        return VectorProcessor(backbone.model.table.vectors, catalog)
    return PromptProcessor(config, backbone, catalog, cache_bytes, vision_cache)
