"""Finds the image of each item: in a column, in a folder of files named after the items, or at an address."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.images import FORMATS, ImageError, decode_image, read_image_file
from pipeline.data.parquet_checks import is_binary, is_image
from pipeline.data.prepare.columns import Columns
from pipeline.data.prepare.download import Downloads


def image_suffixes() -> set[str]:
    """Returns the suffixes of the formats that are read, in lower case: `.jpg`, ..."""
    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS}


class ItemImages:
    """The images of a catalogue."""

    def __init__(
        self,
        columns: Columns,
        folder: Path | None,
        on_bad_image: str,
        downloads: Downloads | None,
        say: Callable[[str], None],
        drop: Callable[[str, int], None],
    ) -> None:
        self.downloads = downloads
        self.columns, self.folder, self.on_bad_image, self.say, self.drop = columns, folder, on_bad_image, say, drop
        self.column = columns.get("image")
        addresses = columns.get("image_url")
        if downloads is None and addresses is not None:
            say(f"{columns.source.path}: `{addresses}` has addresses of images: --download-images fetches them")
        elif downloads is not None and self.column is None:
            self.column = addresses
            if addresses is None:
                fault = f"--download-images has no effect: no column of addresses ({columns.source.path})"
                raise UserError(f"{fault}; name it with --column image_url=NAME", USAGE)
        self.binary = False
        if self.column is not None:
            kind = columns.source.arrow_type(self.column) if self.column in columns.source.names else pa.string()
            self.binary = is_binary(kind) or is_image(kind)
            if not self.binary and columns.source.kinds.get(self.column, "text") not in ("text", "null", "nested"):
                raise UserError(
                    f"column `{self.column}` has the wrong type, {kind} ({columns.source.path}); images are bytes or relative paths", DATA
                )
        self.files: dict[str, str] = {}
        self.count = self.others = 0
        self.used: set[str] = set()
        self.bad = ""  # an item whose image is left out
        if folder is not None:
            self._find_files(folder)

    def _find_files(self, folder: Path) -> None:
        suffixes, twice = image_suffixes(), 0
        files = sorted(
            (path for path in folder.rglob("*") if path.is_file()), key=lambda path: (len(path.parts), path.suffix.lower(), str(path))
        )
        for path in files:
            if path.suffix.lower() in suffixes:
                name = path.relative_to(folder).as_posix()
                self.count += 1
                twice += path.stem in self.files
                self.files.setdefault(path.stem, name)
            else:
                self.others += 1
        if not self.count:
            raise UserError(
                f"no image in the folder ({folder}, {self.others} other files); give a folder of {', '.join(sorted(suffixes)[:12])}, "
                f"... files",
                DATA,
            )
        if twice:
            self.say(f"{folder}: {twice:,} images have the name of another one in another folder or format; the first is taken")

    @property
    def wanted(self) -> bool:
        return self.column is not None or self.folder is not None

    @property
    def link(self) -> str | None:
        """The column of the table `items` with a path or an address, if there is one."""
        return None if self.column is None or self.binary else "image" if self.columns.get("image") is not None else "image_url"

    def fetch(self, links: Iterator[str]) -> None:
        """Fetches the images of addresses, and counts what failed."""
        if self.downloads is not None:
            self.downloads.fetch(link for link in links if re.match("https?://", link))
            if failed := self.downloads.failed:
                url, fault = next(iter(failed.items()))
                self.say(f"warning: {len(failed):,} images cannot be fetched, e.g. {url[:200]}: {fault}; the next run tries them again")

    def read(self, item_ids: Iterator[tuple[str, str | None]]) -> Iterator[bytes | None]:
        """Yields the bytes of each item's image, decoded once, so that a bad one is found before the long steps.

        `item_ids`: the item and the text of its image column or address. Raises `ImageError` unless bad images are left out.
        """
        source = self.columns.source
        values: Iterator[Any] | None = source.values(self.column) if self.binary and self.column is not None else None
        root = self.folder or Path(source.parts[0].path).parent
        for row, (item_id, text) in enumerate(item_ids):
            value: Any = next(values) if values is not None else text
            data, link = (
                (value.get("bytes"), value.get("path"))
                if isinstance(value, dict)
                else (None, value)
                if isinstance(value, str)
                else (value, None)
            )
            where = source.where(row)
            try:
                if not data:
                    if link and self.downloads is not None and "://" in link:
                        file = self.downloads.path(link)
                        data, where = (file.read_bytes() if file.exists() else None), f"{link[:200]}, {where}"
                    elif link or item_id in self.files:
                        path = link or self.files[item_id]
                        if "://" in path:
                            where += "; --download-images fetches it"
                        elif self.folder is None and not (root / path).exists():
                            where += "; --images names the folder of the images"
                        self.used.add(path)
                        where = f"{root / path}, {where}" if (root / path).is_file() else where
                        data = read_image_file(root, path, where)
                if data:
                    decode_image(data, where)
                yield data or None
            except ImageError:
                if self.on_bad_image == "error":
                    raise
                self.bad = self.bad or item_id
                self.drop(f"images that are missing or cannot be decoded (e.g. of {self.bad!r})", 1)
                yield None

    def finish(self, example: str) -> None:
        """Says which files no item uses. Raises `UserError` (3) if none is used."""
        if self.folder is None or self.column is not None:
            return
        unused = len(self.files.keys() - {Path(path).stem for path in self.used})
        if self.count and not self.used:
            some = next(iter(self.files.values()))
            fault = (
                f"no image of the folder is used ({self.folder} has {self.count:,}, e.g. {some!r}; the catalogue has e.g. item_id "
                f"{example!r})"
            )
            raise UserError(f"{fault}; name each file after its item_id, or give an image column with the paths", DATA)
        self.drop(f"image files that no item_id names ({self.folder})", unused)


KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
