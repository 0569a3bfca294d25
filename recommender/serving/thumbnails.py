"""The catalogue beside the recommendations: attributes of items, and their pictures small enough for a page.

Pictures are decoded by the guarded decoder of `pipeline.data.images` and always encoded again, so no byte of an uploaded file
reaches a browser. The last ones stay in memory, up to `CACHE_BYTES`. Everything runs in one thread of its own: reading
a large catalogue, or a hostile picture, delays other pictures and no recommendation.
"""

import asyncio
import io
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from pipeline.core.errors import UserError
from pipeline.data.catalog import Catalog, load_catalog

log = logging.getLogger("tpad.serve")

SIDE, QUALITY = 240, 82  # pixels; of JPEG
CACHE_BYTES = 64 * 1024 * 1024


class Pictures:
    def __init__(self, data: Path | None) -> None:
        self.data = data
        self.thread = ThreadPoolExecutor(1, "pictures")
        self.catalog: Catalog | None = None
        self.kept: dict[str, bytes | None] = {}  # JPEG files in order of use; None: there is no picture
        self.size = 0

    def begin(self) -> None:
        """Reads the catalogue, or reads it again: with a new version come new items. Nobody waits for it."""
        self.kept, self.size = {}, 0
        self.thread.submit(self._load)

    def _load(self) -> None:
        self.catalog = None
        if self.data is not None:
            try:
                self.catalog = load_catalog(self.data)
            except UserError as error:
                log.warning("no pictures: %s", error)

    async def attributes(self, item_id: str) -> dict[str, str]:
        """The texts of an item, by column, but for its title; nothing where there is no data folder."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._attributes, item_id)

    def _attributes(self, item_id: str) -> dict[str, str]:
        if self.catalog is None or item_id not in self.catalog.row:
            return {}
        row = self.catalog.row[item_id]
        return {name: text for name in self.catalog.columns if name != "title" and (text := self.catalog.text(row, name))}

    async def thumbnail(self, item_id: str) -> bytes | None:
        """A JPEG; None for an item without a picture that could be shown."""
        kept = self.kept
        if item_id in kept:
            found = kept.pop(item_id)
        else:
            found = await asyncio.get_running_loop().run_in_executor(self.thread, self._thumbnail, item_id)
            if kept is not self.kept:  # meanwhile the catalogue was read again: this picture may be another now
                return found
            self.size += len(found or b"") - len(self.kept.pop(item_id, None) or b"")
        self.kept[item_id] = found
        while self.size > CACHE_BYTES:
            self.size -= len(self.kept.pop(next(iter(self.kept))) or b"")
        return found

    def _thumbnail(self, item_id: str) -> bytes | None:
        if self.catalog is None or item_id not in self.catalog.row:
            return None
        try:
            image = self.catalog.image(self.catalog.row[item_id])
        except UserError as error:
            log.warning("no picture: %s", error)
            return None
        return None if image is None else small(image, SIDE, QUALITY)


def small(image: Image.Image, side: int, quality: int) -> bytes:
    """A JPEG of at most `side` pixels a side."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
