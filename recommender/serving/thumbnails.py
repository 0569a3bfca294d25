"""Serves attributes and thumbnails of items from the data folder.

Images are decoded by the guarded decoder of `pipeline.data.images` and always encoded again, so no byte of an uploaded file
reaches a browser. The latest thumbnails stay in memory, up to `CACHE_BYTES`. All work runs in one thread: a large catalogue, or a
hostile image, delays other images but no recommendation.
"""

import asyncio
import io
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from pipeline.core.artifact import Version
from pipeline.core.errors import ARTIFACT, UserError
from pipeline.data.catalog import Catalog, load_catalog

log = logging.getLogger("tpad.serve")

SIDE, QUALITY = 240, 82  # pixels; of JPEG
CACHE_BYTES = 64 * 1024 * 1024


class Thumbnails:
    """Reads the catalogue of a data folder in a background thread, and answers from it. Without a folder every answer is empty."""

    def __init__(self, find_data: Callable[[], Path | None]) -> None:
        """`find_data` returns the folder: of each new version anew, since a run may go on over other data."""
        self.find_data = find_data
        self.thread = ThreadPoolExecutor(1, "thumbnails")
        self.catalog: Catalog | None = None
        self.cache: dict[str, bytes | None] = {}  # item_id -> JPEG file, in order of use; None: no image
        self.size = 0  # bytes of the cache

    def reload(self, version: Version) -> None:
        """Starts to read the catalogue, again for each new version, which may have new items; returns at once."""
        self.cache, self.size = {}, 0
        self.thread.submit(self._load, version)

    def _load(self, version: Version) -> None:
        self.catalog = None
        try:
            self.catalog = catalogue_of(version, self.find_data())
        except Exception as error:  # of any kind: recommendations go on without images
            log.warning("no images: %s", error)

    async def attributes(self, item_id: str) -> dict[str, str]:
        """Returns the texts of an item by column, without its title; empty without a data folder."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self._attributes, item_id)

    def _attributes(self, item_id: str) -> dict[str, str]:
        if self.catalog is None or item_id not in self.catalog.row:
            return {}
        row = self.catalog.row[item_id]
        return {name: text for name in self.catalog.columns if name != "title" and (text := self.catalog.text(row, name))}

    async def thumbnail(self, item_id: str) -> bytes | None:
        """Returns a thumbnail of the item's image as a JPEG file; None for an item without a readable image."""
        cache = self.cache
        if item_id in cache:
            jpeg = cache.pop(item_id)
        else:
            jpeg = await asyncio.get_running_loop().run_in_executor(self.thread, self._thumbnail, item_id)
            if cache is not self.cache:  # meanwhile the catalogue was reloaded: the image may have changed
                return jpeg
            self.size += len(jpeg or b"") - len(self.cache.pop(item_id, None) or b"")
        self.cache[item_id] = jpeg
        while self.size > CACHE_BYTES:
            self.size -= len(self.cache.pop(next(iter(self.cache))) or b"")
        return jpeg

    def _thumbnail(self, item_id: str) -> bytes | None:
        if self.catalog is None or item_id not in self.catalog.row:
            return None
        try:
            image = self.catalog.image(self.catalog.row[item_id])
        except UserError as error:
            log.warning("no image: %s", error)
            return None
        return None if image is None else small(image, SIDE, QUALITY)


def catalogue_of(version: Version, data: Path | None) -> Catalog | None:
    """Loads the items of a data folder, which must be those that a version of the session model was published over; None without a folder.

    Raises `UserError` (3 or 4)."""
    if data is None:
        return None
    catalog = load_catalog(data)
    if catalog.sha256 != version.manifest.get("catalogue_sha256"):
        raise UserError(f"these are not the items of {version.path.name} ({catalog.path}); run `tpad index --data` over them", ARTIFACT)
    return catalog


def small(image: Image.Image, side: int, quality: int) -> bytes:
    """Encodes an image as a JPEG file of at most `side` pixels a side."""
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
