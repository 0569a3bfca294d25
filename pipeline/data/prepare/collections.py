"""Reads collections through the library `datasets`, as one Parquet file each.

They are datasets of the Hugging Face hub, folders from `save_to_disk`, folders of images with a metadata file, and WebDataset archives.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import DATA, USAGE, UserError

if TYPE_CHECKING:
    import datasets

HUB = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SAVED = ("dataset_info.json", "dataset_dict.json")  # of save_to_disk
ROWS = 1000  # of a batch
IMAGES = ("jpg", "jpeg", "png", "webp", "gif")  # columns of WebDataset


def is_collection(text: str) -> bool:
    """Returns whether a path or a name is that of a collection."""
    if text.startswith("hf:") and not text.startswith("hf://"):
        return True
    path = Path(text.rpartition("@")[0] or text) if not Path(text).exists() else Path(text)
    if not path.is_dir():
        return path.suffix.lower() == ".tar" and path.is_file()
    return any((path / name).is_file() for name in (*SAVED, *METADATA)) or any(path.glob("*.tar"))


def write_collection(text: str, target: Path) -> None:
    """Writes the rows of a collection to a Parquet file. Raises `UserError` (2, 3)."""
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = _opened(text)
        writer = None
        for table in _tables(rows):
            writer = writer or pq.ParquetWriter(target, table.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table.cast(writer.schema))
        if writer is None:
            raise UserError(f"no rows ({text}); a collection needs at least one", DATA)
        writer.close()
    except UserError:
        raise
    except Exception as error:  # of any loader and any network
        fault = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise UserError(f"not readable as a dataset: {fault} ({text}); check its name and your access", DATA) from None


def _opened(text: str) -> "datasets.IterableDataset | datasets.Dataset":
    import datasets

    if text.startswith("hf:"):
        match = HUB.fullmatch(text)
        if match is None:
            raise UserError(f"{text} (command line); give hf:OWNER/NAME, hf:OWNER/NAME/CONFIG or hf:OWNER/NAME@SPLIT", USAGE)
        return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train", streaming=True)
    name, sign, split = text.rpartition("@") if not Path(text).exists() else (text, "", "")
    path = Path(name)
    if path.is_file() or any(path.glob("*.tar")):
        files = [str(path)] if path.is_file() else sorted(map(str, path.glob("*.tar")))
        return datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    if any((path / saved).is_file() for saved in SAVED):
        found = datasets.load_from_disk(str(path))
        if not isinstance(found, datasets.DatasetDict):
            return found
        if sign and split not in found:
            raise UserError(f"no split {split!r} ({name} has {', '.join(found)}); give one of them", DATA)
        if not sign and len(found) > 1:
            raise UserError(f"several splits ({name} has {', '.join(found)}); give one, such as {name}@{next(iter(found))}", DATA)
        return found[split or next(iter(found))]
    return datasets.load_dataset("imagefolder", data_dir=str(path), split=split or "train", streaming=True)


def _tables(rows: "datasets.IterableDataset | datasets.Dataset") -> Iterator[pa.Table]:
    """Yields the rows in tables; images are bytes, and the parts of a WebDataset's JSON are columns of their own."""
    import datasets

    images = [name for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.Image)]
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    for table in rows.with_format("arrow").iter(ROWS):
        table = table.replace_schema_metadata()
        for name in images:  # files become bytes
            embedded = datasets.Image().embed_storage(table[name].combine_chunks())
            table = table.set_column(table.column_names.index(name), name, embedded)
        if "__key__" in table.column_names:
            names = [name for name in table.column_names if name not in ("__key__", "__url__")]
            table = table.select(["__key__", *names]).rename_columns(["item_id", *("image" if name in IMAGES else name for name in names)])
            if "json" in names:
                parts = pa.table({"json": table["json"]}).flatten()
                parts = parts.rename_columns([name.removeprefix("json.") for name in parts.column_names])
                table = table.drop_columns([*({"item_id"} & {*parts.column_names}), "json"])
                for name in parts.column_names:
                    table = table.append_column(name, parts[name])
        yield table
