"""Finds the files of a table: a file, a folder of parts, a glob, an archive or a remote address, and makes each one plain.

What DuckDB and Arrow read as they are is linked into the temporary folder; compressed files, other encodings than UTF-8 and mixed line
ends are copied there first, as UTF-8 with one kind of line end.
"""

import bz2
import codecs
import glob
import gzip
import itertools
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pipeline.core.errors import DATA, USAGE, UserError
from pipeline.data.prepare.collections import is_collection, write_collection

KINDS = {
    **dict.fromkeys((".csv", ".tsv", ".tab", ".txt", ".dat", ".data", ".inter", ".item", ".user"), "csv"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"PK\x03\x04": ".zip", b"\x28\xb5\x2f\xfd": ".zst", b"\xfd7zXZ": ".xz"}
COMPRESSED = (*MAGIC.values(), ".zstd", ".bz")
BLOCK = 8 * 1024 * 1024
SEVEN_BIT = ("iso2022", "utf_7", "hz")  # encodings whose files are ASCII, byte by byte
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, pa.ArrowException)
PARTS = 100_000  # most files of a folder


@dataclass
class Part:
    """One file of a table, and how it is laid out."""

    path: str  # as people know it
    kind: str  # csv, json or parquet
    file: Path  # what to read
    hive: dict[str, str] = field(default_factory=dict)  # columns that the folders' names give: day=2024-03-01
    tabs: bool = False  # by its name a file with tabs
    quotes: bool = False  # it has quotation marks
    names: list[str] = field(default_factory=list)  # of the columns; this and what follows is found by `layouts`
    effects: set[str] = field(default_factory=set)  # options that had an effect
    relation: str = ""  # SQL after FROM, of text files
    delimiter: str = ""
    quote: str = ""
    skip: int = 0  # lines before the first row
    lists: set[str] = field(default_factory=set)  # columns whose typed header says that they hold lists, parted by blanks
    types: dict[str, pa.DataType] = field(default_factory=dict)  # of Parquet


def find_parts(paths: list[str], folder: Path, encoding: str | None, say: Callable[[str], None]) -> list[Part]:
    """Returns the files that the paths name, as files that can be read without more ado. Raises `UserError` (2, 3)."""
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise UserError(f"--encoding {encoding} (command line); give one that Python knows, such as cp1252 or utf-16", USAGE) from None
    parts = []
    for text, path, hive in itertools.chain.from_iterable(_expand(text, folder, say) for text in paths):
        parts.append(_plain(text, path, hive, folder / f"part-{len(list(folder.iterdir()))}", encoding))
    if len({part.kind for part in parts}) > 1:
        one, other = parts[0], next(part for part in parts if part.kind != parts[0].kind)
        raise UserError(f"files of two kinds ({one.path} and {other.path}); give one kind of file at a time", DATA)
    return parts


def _expand(text: str, folder: Path, say: Callable[[str], None]) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """Yields the name, the path and the hive columns of every file of a path."""
    if is_collection(text):
        copy = folder / f"collection-{len(list(folder.iterdir()))}.parquet"
        write_collection(text, copy)
        yield text, copy, {}
        return
    if "://" in text:
        yield from _remote(text, folder)
        return
    path, unused = Path(text), list[str]()
    if path.is_dir():
        files = sorted(itertools.islice((file for file in path.rglob("*") if not file.is_dir()), PARTS))
        hidden = {file for file in files if any(part.startswith(("_", ".")) for part in file.relative_to(path).parts)}
        used = [file for file in files if file not in hidden and (_kind(file.name)[0] or not file.is_file())]
        if not used:
            raise UserError(f"no table in the folder ({text}); give a folder of CSV, TSV, JSON lines or Parquet files", DATA)
        unused = [file.name for file in set(files) - set(used)]
    elif path.exists() or not glob.has_magic(text):
        used = [path]
    elif not (used := [Path(name) for name in sorted(glob.glob(text, recursive=True)) if not Path(name).is_dir()]):
        raise UserError(f"no file matches ({text}); give an existing file, folder or pattern", DATA)
    if used != [path] and (unused or len(used) > 1):
        left_out = f"; left out: {', '.join(sorted(unused)[:5])}{' ...' if len(unused) > 5 else ''}" if unused else ""
        say(f"{text}: {len(used)} files{left_out}")
    for file in used:
        parents = file.relative_to(path).parts[:-1] if path.is_dir() else file.parts[:-1] if file != path else ()
        yield str(file), file, {key: value for key, sign, value in (part.partition("=") for part in parents) if sign}


def _remote(text: str, folder: Path) -> Iterator[tuple[str, Path, dict[str, str]]]:
    """Copies what a remote address names into the temporary folder."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(text)
        names = sorted(system.glob(root)) if glob.has_magic(root) else sorted(system.find(root)) if system.isdir(root) else [root]
        names = [name for name in names if not Path(name).name.startswith(("_", "."))]
        if not names:
            raise UserError(f"no file there ({text}); give an existing address", DATA)
        for number, name in enumerate(names):
            copy = folder / f"remote-{number}" / Path(name).name
            copy.parent.mkdir(exist_ok=True)
            system.get_file(name, str(copy))
            yield f"{text.split('://')[0]}://{name.split('://')[-1]}", copy, {}
    except UserError:
        raise
    except Exception as error:  # of any file system
        fault = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise UserError(f"not readable: {fault} ({text}); check the address and your access, or give a local file", DATA) from None


def _kind(file_name: str) -> tuple[str, bool, bool]:
    """Returns the kind by the name, '' if unknown; whether the name says that it is compressed, and that it has tabs."""
    lower = file_name.lower()
    bare = next((lower.removesuffix(suffix) for suffix in COMPRESSED if lower.endswith(suffix)), lower)
    return KINDS.get(Path(bare).suffix, ""), bare != lower, bare.endswith((".tsv", ".tab", ".inter", ".item", ".user"))


def _plain(text: str, path: Path, hive: dict[str, str], file: Path, encoding: str | None) -> Part:
    """Links or copies a file to one that can be read."""
    kind, compressed, tabs = _kind(path.name)
    if not path.exists():
        raise UserError(f"file not found ({text}); give an existing CSV, TSV, JSON lines or Parquet file", DATA)
    if not path.is_file():
        raise UserError(f"not a plain file ({text}); give a file that can be read more than once", DATA)
    if not kind or (compressed and kind == "parquet"):
        raise UserError(f"unknown kind of file ({text}); give .csv, .tsv or .jsonl (also .gz, .zst, .bz2, .xz, .zip), or .parquet", DATA)
    part = Part(text, kind, file, hive, tabs)
    try:
        with path.open("rb") as stream:
            start = stream.read(8)
        suffix = next((suffix for magic, suffix in MAGIC.items() if start.startswith(magic)), None)
        if kind != "parquet" and (compressed or suffix):
            with _decompressed(path, suffix) as stream, file.open("wb") as copy:
                shutil.copyfileobj(stream, copy, BLOCK)
        else:
            file.symlink_to(path.absolute())
    except FAULTS as error:
        raise UserError(f"not readable: {str(error).rstrip('.')[:200] or type(error).__name__} ({text}); fix the file", DATA) from None
    if kind != "parquet":
        _make_text(part, encoding)
    return part


@contextmanager
def _decompressed(path: Path, suffix: str | None) -> Iterator[IO[bytes]]:
    stream: Any
    if suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
            if len(names) != 1:
                raise zipfile.BadZipFile(f"the archive has {len(names)} files ({', '.join(names[:3])}): unpack it")
            with archive.open(names[0]) as stream:
                yield stream
        return
    if suffix is None:
        raise OSError(f"the name says that it is compressed ({path.suffix}), but it is not")
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": lambda path: pa.input_stream(str(path), compression="zstd")}
    with opened[suffix](path) as stream:  # type: ignore[operator]
        yield stream


def _make_text(part: Part, encoding: str | None) -> None:
    """Replaces a file that is not UTF-8, or whose line ends differ, by a copy; looks for quotation marks."""
    returns = newlines = pairs = 0
    decoder, begin, before, readable = codecs.getincrementaldecoder("utf-8")(), b"", b"", True
    with part.file.open("rb") as stream:
        while block := stream.read(BLOCK):
            begin = begin or block[:4]
            part.quotes = part.quotes or b'"' in block
            returns, newlines, pairs = returns + block.count(b"\r"), newlines + block.count(b"\n"), pairs + block.count(b"\r\n")
            pairs += before == b"\r" and block[:1] == b"\n"
            before = block[-1:]
            try:
                readable = readable and b"\0" not in block and bool(decoder.decode(block) or True)
            except UnicodeDecodeError:
                readable = False
    source = next((codec for bom, codec in BOMS.items() if begin.startswith(bom)), None)
    seven_bit = encoding is not None and codecs.lookup(encoding).name.startswith(SEVEN_BIT)
    if source is None and (seven_bit or not readable):
        if encoding is None:
            raise UserError(_not_text(part), DATA)
        source = encoding
    if source is None and (not returns or returns == newlines == pairs):
        return
    copy = part.file.with_name(part.file.name + "-text")
    try:
        with part.file.open(encoding=source or "utf-8") as reader, copy.open("w", encoding="utf-8", newline="\n") as writer:
            shutil.copyfileobj(reader, writer, BLOCK)
    except (UnicodeError, LookupError) as error:
        raise UserError(f"not text in {source}: {str(error)[:120]} ({part.path}); give another --encoding", DATA) from None
    part.file.unlink()
    part.file = copy


def _not_text(part: Part) -> str:
    """Says on which line a file is not UTF-8."""
    place = part.path
    with part.file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            place = f"{part.path} line {number}"
            if b"\0" in line:
                return f"not text: a byte 0 ({place}); fix the file, or give its encoding, such as --encoding utf-16-le"
            try:
                line.decode()
            except UnicodeDecodeError:
                break
    return f"not text in UTF-8 ({place}); give its encoding, such as --encoding cp1252"
