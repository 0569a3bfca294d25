"""Gives the image of an item, ready for the model: cached vision features if there are any, else preprocessed pixels.

`ModelImages.get` is the only place that decides which of the two it is. Its sources are, in this order: the vision cache on the disk
(`vision_cache.py`, given when the object is built), images preprocessed earlier and held in memory, and the catalogue's file.

A file is opened up to three times before its image is used: for its key (a hash of its bytes), for its size (the header alone, to
count tokens before decoding) and to be decoded. The bytes come from row groups that the catalogue holds in memory, so this costs no
further reading from the disk.
"""

import hashlib
import time

from torch import Tensor

from pipeline.core.config import BackboneConfig
from pipeline.core.errors import USAGE, UserError
from pipeline.data.catalog import Catalog
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.image_tokens import FAMILIES, BackboneProcessor
from pipeline.mllm.vision_cache import VisionCache
from pipeline.mllm.vision_tower import ImageInput

IMAGE_CACHE_BYTES = 1 << 30  # of preprocessed images held in memory, so that epochs after the first decode nothing


class ModelImages:
    """The images of one catalogue's items, as one backbone takes them.

    `memory_bytes` bounds the preprocessed images held in memory; 0: each image is used once and nothing is held. The `model_type` of
    the backbone selects the family of `image_tokens.py`. Raises `UserError` (2) for an unknown family and for a `max_pixels` that it
    does not support.
    """

    def __init__(
        self, config: BackboneConfig, backbone: Backbone, catalog: Catalog, memory_bytes: int, cache: VisionCache | None = None
    ) -> None:
        self.catalog, self.cache, self.model = catalog, cache, backbone.model
        self.backbone_processor = BackboneProcessor(backbone.model.config, backbone.tokenizer, backbone.image_processor, config.max_pixels)
        family: str = backbone.model.config.model_type
        if family not in FAMILIES:
            raise UserError(f"backbone family `{family}` is not supported (backbone.name); supported: {', '.join(FAMILIES)}", USAGE)
        self.family = FAMILIES[family]
        if config.max_pixels and not self.family.sized:
            raise UserError(
                f"every image has the same number of tokens in the family `{family}` (max_pixels = {config.max_pixels}); leave it null",
                USAGE,
            )
        self.seconds = 0.0  # spent on decoding and preprocessing images
        self._free_bytes = memory_bytes
        self._preprocessed: dict[int, ImageInput] = {}
        self._keys: dict[int, bytes] | None = {} if memory_bytes else None

    def get(self, row: int) -> ImageInput:
        """Returns the image of the item `row`, which must have one: with cached vision features, else with preprocessed pixels.

        Raises `ImageError` for an image that cannot be decoded.
        """
        if self.cache is not None and (cached := self.cache.find(self.key(row))) is not None:
            return cached
        if row not in self._preprocessed:
            return self._preprocess(row)
        return self._preprocessed[row]

    def _preprocess(self, row: int) -> ImageInput:
        """Decodes and preprocesses an image, and holds it in memory if there is room."""
        start = time.perf_counter()
        image = self.catalog.image(row)
        assert image is not None, "the prompt holds an image that the item lacks"
        ids, tensors = self.family.encode(self.backbone_processor, image)
        # in the type to which every vision tower casts first: half the bytes to hold and to send
        tensors = {name: t.to(self.model.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        preprocessed = ImageInput(self.key(row), ids, tensors)
        if (size := _bytes(tensors)) <= self._free_bytes:
            self._free_bytes -= size
            self._preprocessed[row] = preprocessed
        self.seconds += time.perf_counter() - start
        return preprocessed

    def key(self, row: int) -> bytes:
        """Returns the sha256 of the image file's bytes, by which equal images are recognised."""
        key = self._keys.get(row) if self._keys is not None else None
        if key is None:
            key = hashlib.sha256(self.catalog.image_bytes(row) or b"").digest()
            if self._keys is not None:
                self._keys[row] = key
        return key

    def count_tokens(self, row: int) -> int:
        """Returns how many tokens the image will have, from its size in the file's header, without decoding it."""
        return self.family.tokens(self.backbone_processor, self.catalog.image_size(row))


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())
