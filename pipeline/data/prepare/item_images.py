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
from pipeline.data.prepare.table_options import Report

KIND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LINK = "__link"  # column of the paths and addresses of images, which is not written
GROUP_BYTES = 16 * 1024 * 1024  # largest row group; random access to images reads whole groups


def image_suffixes() -> set[str]:
    """Returns the suffixes of the formats that are read, in lower case: `.jpg`, ..."""
    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS}


class ItemImages:
    """The images of a catalogue."""

    def __init__(self, columns: Columns, folder: Path | None, skip_bad: bool, downloads: Downloads | None, report: Report) -> None:
        """`skip_bad`: an image that cannot be decoded is left out and counted; else it is an error."""
        self.source, self.folder, self.skip_bad, self.downloads, self.report = columns.source, folder, skip_bad, downloads, report
        self.role = "image" if columns.get("image") is not None else None
        addresses = columns.get("image_url")
        if downloads is None and addresses is not None:
            self.source.say(f"`{addresses}` has addresses of images: --download-images fetches them")
        elif downloads is not None and self.role is None:
            self.role = "image_url"
            if addresses is None:
                fault = f"--download-images has no effect: no column of addresses ({self.source.path})"
                raise UserError(f"{fault}; name it with --column image_url=NAME", USAGE)
        self.values: Iterator[Any] | None = None  # of a column of bytes, row by row
        if self.role is not None:
            column = columns.need(self.role)
            kind = self.source.arrow_type(column)
            if is_binary(kind) or is_image(kind):
                self.values = self.source.values(column)
            elif self.source.kinds.get(column, "text") not in ("text", "null", "nested"):
                fault = f"column `{column}` has the wrong type, {kind} ({self.source.path})"
                raise UserError(f"{fault}; images are bytes or relative paths", DATA)
        self.files: dict[str, str] = {}  # name without suffix -> path in the folder
        self.used: set[str] = set()
        self.row = self.images = 0  # done, and found
        self.bad = ""  # an item whose image is left out
        if folder is not None:
            self._find_files(folder)

    def _find_files(self, folder: Path) -> None:
        suffixes = image_suffixes()
        files = sorted(
            (path for path in folder.rglob("*") if path.is_file()), key=lambda one: (len(one.parts), one.suffix.lower(), str(one))
        )
        images = [path for path in files if path.suffix.lower() in suffixes]
        for path in images:
            self.files.setdefault(path.stem, path.relative_to(folder).as_posix())
        if not images:
            fault = f"no image in the folder ({folder}, {len(files)} other files)"
            raise UserError(f"{fault}; give a folder of {', '.join(sorted(suffixes)[:12])}, ... files", DATA)
        if twice := len(images) - len(self.files):
            self.report.say(f"{folder}: {twice:,} images have the name of another one in another folder or format; the first is taken")

    @property
    def wanted(self) -> bool:
        return self.role is not None or self.folder is not None

    @property
    def links(self) -> dict[str, str]:
        """Name -> SQL of the column of paths or addresses, if there is one."""
        return {} if self.role is None or self.values is not None else {LINK: self.role}

    def fetch(self) -> None:
        """Fetches the images of addresses, and counts what failed."""
        if self.downloads is None or not self.links:
            return
        links = self.source.data.rows(f"select {self.role} from items where {self.role} is not null order by rowid")
        self.downloads.fetch(link for (link,) in links if re.match("https?://", link))
        if failed := self.downloads.failed:
            url, fault = next(iter(failed.items()))
            self.report.say(f"warning: {len(failed):,} images cannot be fetched, e.g. {url[:200]}: {fault}; the next run tries them again")

    def added_to(self, table: pa.Table, advance: Callable[[], None]) -> Iterator[pa.Table]:
        """Yields the next items with the column `image`, in pieces of some megabytes. Raises `ImageError` for a bad image."""
        links = table[LINK].to_pylist() if LINK in table.column_names else [None] * len(table)
        table = table.drop_columns(LINK) if LINK in table.column_names else table
        column: list[dict[str, Any] | None] = []
        size = done = 0
        for number, (item_id, link) in enumerate(zip(table["item_id"].to_pylist(), links, strict=True), 1):
            data = self._read(item_id, link)
            column.append({"bytes": data, "path": None} if data else None)
            size += len(data or b"")
            self.images += bool(data)
            self.row += 1
            advance()
            if number == len(table) or size > GROUP_BYTES:
                yield table.slice(done, len(column)).append_column("image", pa.array(column, KIND))
                column, size, done = [], 0, number

    def _read(self, item_id: str, link: str | None) -> bytes | None:
        """Returns the bytes of an item's image, decoded once, so that a bad one is found before the long steps."""
        data = None
        if self.values is not None:
            data = next(self.values)
            data, link = (data.get("bytes"), data.get("path")) if isinstance(data, dict) else (data, None)
        try:
            return self._checked(data, item_id, link, "")
        except ImageError:
            if not self.skip_bad:
                self._checked(data, item_id, link, self.source.where(self.row))  # to find the line of every item would take too long
            self.bad = self.bad or item_id
            self.report.drop(f"images that are missing or cannot be decoded (e.g. of {self.bad!r})", 1)
            return None

    def _checked(self, data: bytes | None, item_id: str, link: str | None, where: str) -> bytes | None:
        if not data and link and self.downloads is not None and "://" in link:
            file = self.downloads.path(link)
            data, where = (file.read_bytes() if file.exists() else None), f"{link[:200]}, {where}"
        elif not data and (path := link or self.files.get(item_id)):
            data, where = self._read_file(path, where)
        if data:
            decode_image(data, where)
        return data or None

    def _read_file(self, path: str, where: str) -> tuple[bytes, str]:
        root = self.folder or Path(self.source.parts[0].path).parent
        if "://" in path:
            where += "; --download-images fetches it"
        elif self.folder is None and not (root / path).exists():
            where += "; --images names the folder of the images"
        self.used.add(path)
        where = f"{root / path}, {where}" if (root / path).is_file() else where
        return read_image_file(root, path, where), where

    def finish(self) -> None:
        """Says which files no item uses. Raises `UserError` (3) if none is used."""
        if self.folder is None or self.role is not None:
            return
        if not self.used:
            example = self.source.data.one("select item_id from items order by rowid limit 1")[0]
            some = f"{self.folder} has {len(self.files):,}, e.g. {next(iter(self.files.values()))!r}"
            fault = f"no image of the folder is used ({some}; the catalogue has e.g. item_id {example!r})"
            raise UserError(f"{fault}; name each file after its item_id, or give an image column with the paths", DATA)
        self.report.drop(f"image files that no item_id names ({self.folder})", len(self.files) - len(self.used))
