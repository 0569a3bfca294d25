"""Batch export: every item through the unified MLLM once, into a published version of `run/embeddings`.

The catalogue is cut into parts of fixed rows. A part is computed whole (`parts.py`), by one process (`shards.py`), in
batches that do not reach beyond it (`batches.py`), so its bytes do not depend on how many processes there are or how often
they were interrupted. Here it is decided what must be computed, and how the result is published.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.batches import Source
from pipeline.core.artifact import Version, environment, open_verified, published
from pipeline.core.config import BackboneConfig, Config, DataConfig
from pipeline.core.errors import ARTIFACT, DATA, USAGE, UserError
from pipeline.core.files import canonical_json
from pipeline.core.process import keep_freed_memory
from pipeline.data.catalog import Catalog, load_catalog
from pipeline.data.embeddings import HALVES, halves_of, vectors_of
from pipeline.mllm import early_exit, prompts
from pipeline.mllm.neighbour_titles import load_neighbours
from pipeline.mllm.processor import Encoder
from pipeline.mllm.prompt_templates import Templates
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.saved_mllm import load_mllm
from pipeline.mllm.vision_cache import Cache
from pipeline.parts import Base, Exporter, Work, is_part
from pipeline.shards import Shards, current_pointer

COMPILED_LENGTHS = 32  # sequences are padded to multiples of this for torch.compile
RECIPE = {  # what else than its content makes an item's vector, and how to say that it changed
    "mllm_sha256": "the MLLM",
    "prompts_version": "the prompts",
    "dtype": "the type of the vectors",
    "max_pixels": "the image budget",
    "layers": "how many layers are run",
    "on_bad_image": "what is done about bad images",
    "neighbours": "the neighbours of items that lack something",
}
POOLING = {"last": "last attended token", "mean": "mean of the tokens"}


@dataclass(frozen=True)
class Exported:
    version: Version | None  # None: parts are left, to other --shard runs
    rows: int
    dim: int
    made: bool  # False: the published version already was of this model and catalogue
    work: Work = field(default_factory=Work)
    left: int = 0  # parts not there yet
    parts: int = 0
    notes: list[str] = field(default_factory=list)


def export(config: Config, run: Path, data: Path, update: bool = False, share: tuple[int, int] = (1, 1)) -> Exported:
    """Item embeddings e(v) = [k(v) ; p(v)] of a data folder's items by `run/mllm`. Raises `UserError`.

    `update` keeps the vectors of unchanged items; `share` (i, n) does the i-th of n shares only, and publishes if that is all.
    """
    keep_freed_memory()
    with environment(run / "embeddings"):
        return _export(config, run, data, update, share)


def _export(config: Config, run: Path, data: Path, update: bool, share: tuple[int, int]) -> Exported:
    root = run / "embeddings"
    model = open_verified(run / "mllm", "mllm", "run `tpad distill` first")
    settings = json.loads((model.path / "mllm.json").read_text(encoding="utf-8"))
    if settings["prompts"] != prompts.VERSION:
        raise UserError(
            f"the MLLM was trained with prompts of version {settings['prompts']} ({model.path}); run `tpad distill` again", ARTIFACT
        )
    trained = BackboneConfig.model_validate(settings["backbone"])
    backbone_config = trained.model_copy(
        update={"max_pixels": config.export.max_pixels or trained.max_pixels, "attention": config.export.attention or trained.attention}
    )
    catalog = load_catalog(data, stream=True)
    halves = [half for half in HALVES if half in settings["heads"]]  # an ablation may have one
    depth = layers_run(config.export.layers, settings)
    named = config.data.neighbours.run
    if named is not None and settings.get("neighbours") is None:
        raise UserError(
            f"the MLLM was trained without neighbours (data.neighbours.run = {named}); set null, or run `tpad distill` with them", USAGE
        )
    data_config = DataConfig.model_validate(settings["data"])
    near = data_config.neighbours.model_copy(update={"run": named})
    neighbours = load_neighbours(near, catalog, model.manifest["sessions_sha256"])
    recipe = {
        "mllm_sha256": model.manifest_sha256,
        "prompts_version": prompts.VERSION,
        "dtype": config.export.dtype,
        "max_pixels": backbone_config.max_pixels,
        "layers": depth,
        "on_bad_image": config.data.on_bad_image,
        "neighbours": neighbours and neighbours.sha256,
    }
    layout = {
        "shard_rows": config.export.shard_rows,
        "token_budget": config.export.token_budget,
        "format": config.export.format,
        "attention": backbone_config.attention,
        "compile": config.export.compile,
    }
    facts = recipe | layout | {"catalogue_sha256": catalog.sha256}
    pointer = current_pointer(root)
    before = published(root, "embeddings")
    if before is not None and all(before.manifest.get(key) == value for key, value in facts.items()) and not (update and catalog.by_path):
        return Exported(before, before.manifest["rows"], before.manifest["dim"], made=False)
    notes, base = [], None
    if update and before is not None:
        changed = [what for key, what in RECIPE.items() if before.manifest.get(key) != recipe[key]]
        if changed:
            notes.append(f"a full export, not an update: {' and '.join(changed)} changed")
        else:
            base = Base(before, catalog.item_ids)
    elif update:
        notes.append("a full export: there is nothing to update yet")
    fingerprint = hashlib.sha256(canonical_json(facts | {"base": base and base.version.manifest_sha256})).hexdigest()
    facts["fingerprint"] = fingerprint
    bounds = range(0, len(catalog), config.export.shard_rows)
    parts = {f"part-{n:05d}.parquet": np.arange(first, min(first + bounds.step, len(catalog))) for n, first in enumerate(bounds)}
    skips = config.data.on_bad_image == "skip"
    shards = Shards(root, "embeddings", fingerprint, lambda path, name: is_part(path, catalog, parts[name], skips))
    with shards:
        if not shards.begin(pointer):
            return _export(config, run, data, update, share)

        mllm, backbone, _ = load_mllm(model.path, backbone_config, merge=True)
        if depth is not None:
            early_exit.stop_after(mllm, depth)
        if model.manifest["catalogue_sha256"] != catalog.sha256:
            # new items are welcome: their content is all the model needs
            facts["distilled_on_catalogue_sha256"] = model.manifest["catalogue_sha256"]
        encoder = Encoder(backbone_config, backbone, catalog, cache_bytes=0)
        if (run / "vision").is_dir():  # what `tpad distill` has kept, as far as it is of this vision tower and image budget
            encoder.kept = Cache(run / "vision", backbone, backbone_config.max_pixels)
        source = Source(
            catalog,
            Prompts(
                catalog,
                data_config.model_copy(update={"on_bad_image": "error"}),
                Templates.model_validate(settings["templates"]),
                neighbours,
            ),
            encoder,
            config.export.token_budget,
            config.data.on_bad_image,
            COMPILED_LENGTHS if config.export.compile else 1,
        )
        exporter = Exporter(config.export, shards, parts, source, mllm, base, settings["dim"], halves)
        names = list(parts)[share[0] - 1 :: share[1]]
        exporter.run(names, wait=share == (1, 1))
    if left := shards.left(list(parts)):
        return Exported(None, len(catalog), settings["dim"], True, exporter.work, len(left), len(parts), notes)

    def finish() -> dict[str, Any]:
        folder = shards.staging.path
        manifest = _manifest(folder, list(parts), facts, settings, model, source.views.shown, catalog if skips else None)
        if not manifest["rows"]:
            raise UserError(
                f"every item would be left out for its picture ({catalog.path}); replace them, or set data.on_bad_image to text_only", DATA
            )
        (folder / "README.md").write_text(_card(manifest), encoding="utf-8")
        if config.export.format == "npy":
            _write_arrays(folder, manifest)
        return manifest

    version = shards.publish(finish, config.export.keep)
    return Exported(version, version.manifest["rows"], settings["dim"], True, exporter.work, 0, len(parts), notes)


def layers_run(wanted: int | None, settings: dict[str, Any]) -> int | None:
    """The first so many layers of the MLLM's decoder; None: all of them."""
    if wanted is None:
        return None
    depth = len(settings.get("layers", []))
    if wanted > depth:
        raise UserError(f"the MLLM has {depth} measured layers (export.layers = {wanted}); give no more, or null for all", USAGE)
    return None if wanted == depth else wanted


# --- what is published


def _manifest(
    folder: Path,
    parts: list[str],
    facts: dict[str, Any],
    settings: dict[str, Any],
    model: Version,
    shown: list[str],
    catalog: Catalog | None,
) -> dict[str, Any]:
    """`catalog`: where items may have been skipped, and must be listed."""
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
    if facts["layers"] is not None:
        manifest["measured"] = settings["layers"][facts["layers"] - 1]
    if catalog is not None:
        there = {item for name in parts for item in pq.read_table(folder / name, columns=["item_id"])["item_id"].to_pylist()}
        manifest["skipped"] = [item for item in catalog.item_ids if item not in there]
    return manifest


def _card(manifest: dict[str, Any]) -> str:
    dim, dtype = manifest["dim"], manifest["dtype"]
    scale = " (int8; multiply a row by its `knowledge_scale` or `transition_scale`)" if dtype == "int8" else ""
    revision = f", revision {manifest['revision']}" if manifest["revision"] else ""
    halves = halves_of(manifest)
    says = {"knowledge": f"{dim} x {dtype}{scale}, what the item is", "transition": f"{dim} x {dtype}, what people move on to from it"}
    vectors = "\n".join(f"- `{half}`: {says[half]}" for half in halves)
    lengths = "Both vectors have length one" if halves == HALVES else "The vector has length one"
    cosines = ", ".join(f"{value:.4f} for `{half}`" for half, value in manifest.get("measured", {}).items() if half in HALVES)
    early = (
        f"\nOnly the first {manifest['layers']} layers were run. Mean cosine with all of them, on a sample: {cosines}.\n" if cosines else ""
    )
    return f"""# Item embeddings

{manifest["rows"]} items. One row an item, in the order of the catalogue, in `part-*.parquet`:

- `item_id`
{vectors}
- `has_image`, `has_text`: what of it the model was shown; `n_tokens`: how long its prompt was
- `content_sha256`: of what the model was shown

{lengths}: compare by inner product or cosine. They were made by a unified MLLM (TPAD, arXiv
2504.10538) on the backbone `{manifest["backbone"]}`{revision}, whose licence and limits they inherit, from the columns
{", ".join(f"`{name}`" for name in manifest["prompts"]["text"])} and the image, by the {manifest["pooling"]}. The transition half
has seen training sessions only. `manifest.json` has the sha256 of every file here, of the catalogue and of the weights.
{early}"""


def _write_arrays(folder: Path, manifest: dict[str, Any]) -> None:
    """knowledge.npy and transition.npy (N, D), and item_ids.txt, a line each; written part by part."""
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
