"""Writes what is published beside the vectors: the manifest, the README card, and copies as .npy."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.core.artifact import Version
from pipeline.data.catalog import Catalog
from pipeline.data.embeddings import HALVES, halves_of, vectors_of
from pipeline.mllm import prompts

POOLING = {"last": "last attended token", "mean": "mean of the tokens"}


def manifest_of(
    folder: Path,
    parts: list[str],
    facts: dict[str, Any],
    settings: dict[str, Any],
    model: Version,
    shown: list[str],
    catalog: Catalog | None,
) -> dict[str, Any]:
    """Returns the manifest of the parts in `folder`. `catalog`: given where items may have been skipped, to list them."""
    counts = {name: pq.read_metadata(folder / name).num_rows for name in parts}
    manifest = facts | {
        "rows": sum(counts.values()),
        "dim": settings["dim"],
        "metric": "cosine",
        "parts": [{"name": name, "rows": rows} for name, rows in counts.items()],
        "backbone": Path(settings["backbone"]["name"]).name,  # of a local folder, its name
        "revision": settings["backbone"]["revision"],
        "weights_sha256": next(f["sha256"] for f in model.manifest["files"] if f["name"] == "weights.safetensors"),
        "prompts": {"version": prompts.VERSION, "text": shown, "templates": settings["templates"]},
        "pooling": POOLING[settings["backbone"].get("pooling", "last")],
        "sessions_sha256": model.manifest["sessions_sha256"],
    }
    if (halves := [half for half in HALVES if half in settings["heads"]]) != list(HALVES):
        manifest["halves"] = halves
    if catalog is not None:
        exported = {item for name in parts for item in pq.read_table(folder / name, columns=["item_id"])["item_id"].to_pylist()}
        manifest["skipped"] = [item for item in catalog.item_ids if item not in exported]
    return manifest


def card(manifest: dict[str, Any]) -> str:
    """Returns the README of a version, in Markdown."""
    dim, dtype = manifest["dim"], manifest["dtype"]
    scale = " (int8; multiply a row by its `knowledge_scale` or `transition_scale`)" if dtype == "int8" else ""
    revision = f", revision {manifest['revision']}" if manifest["revision"] else ""
    halves = halves_of(manifest)
    says = {"knowledge": f"{dim} x {dtype}{scale}, what the item is", "transition": f"{dim} x {dtype}, what people move on to from it"}
    vectors = "\n".join(f"- `{half}`: {says[half]}" for half in halves)
    lengths = "Both vectors have length one" if halves == HALVES else "The vector has length one"
    layers = manifest["layers"]
    early = "" if layers is None else f"\nOnly the first {layers} layers were run: the vectors differ from those of the full model.\n"
    return f"""---
pretty_name: Item embeddings
tags: [embeddings, recommendation]
size_categories: [{_size(manifest["rows"])}]
configs:
  - config_name: default
    data_files: "part-*.parquet"
---

# Item embeddings

{manifest["rows"]} items. One row an item, in the order of the catalogue, in `part-*.parquet`:

- `item_id`
{vectors}
- `has_image`, `has_text`: what of it the model was shown; `n_tokens`: how long its prompt was
- `content_sha256`: of what the model was shown

{lengths}: compare by inner product or cosine. They were made by a unified MLLM (TPAD, arXiv
2504.10538) on the backbone `{manifest["backbone"]}`{revision}, whose licence and limits they inherit, from the columns
{", ".join(f"`{name}`" for name in manifest["prompts"]["text"])} and the image, by the {manifest["pooling"]}. The transition half
has seen training sessions only. `manifest.json` has the sha256 of every file here, of the catalogue and of the weights.

`datasets.load_dataset(FOLDER, split="train")` reads this folder as it is.
{early}"""


def _size(rows: int) -> str:
    """Returns the category of a dataset's size, in the terms of the Hugging Face hub."""
    limits = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M", 10**8: "10M<n<100M"}
    return next((name for limit, name in limits.items() if rows < limit), "100M<n<1B")


def write_arrays(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes knowledge.npy and transition.npy (N, D), and item_ids.txt with one id a line, part by part."""
    dtype = np.dtype("float32" if manifest["dtype"] == "int8" else manifest["dtype"])
    shape = (manifest["rows"], manifest["dim"])
    names = [part["name"] for part in manifest["parts"]]
    for half in halves_of(manifest):
        with open(folder / f"{half}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            )
            for name in names:
                columns = [half, f"{half}_scale"] if manifest["dtype"] == "int8" else [half]
                file.write(np.ascontiguousarray(vectors_of(pq.read_table(folder / name, columns=columns), half), dtype).tobytes())
    with open(folder / "item_ids.txt", "w", encoding="utf-8") as ids:
        for name in names:
            ids.writelines(f"{item}\n" for item in pq.read_table(folder / name, columns=["item_id"])["item_id"].to_pylist())
