"""Batch export: every item through the unified MLLM once, into a published version of `run/embeddings`.

The catalogue is cut into parts of fixed rows. A part is computed whole (`exporter.py`), by one process (`part_claims.py`), in
batches that do not reach beyond it (`item_batches.py`), so its bytes do not depend on how many processes there are or how often
they were interrupted. Here it is decided what must be computed, and how the result is published.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.artifact import Version, environment, open_verified, published
from pipeline.core.config import BackboneConfig, Config, DataConfig
from pipeline.core.errors import ARTIFACT, DATA, USAGE, UserError
from pipeline.core.files import canonical_json
from pipeline.core.process import keep_freed_memory
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import HALVES
from pipeline.export.card import card, manifest_of, write_arrays
from pipeline.export.exporter import Exporter, ExportStats, is_part
from pipeline.export.item_batches import ItemBatches
from pipeline.export.part_claims import PartClaims, current_pointer
from pipeline.export.unchanged_rows import PreviousVersion
from pipeline.mllm import early_exit, prompts
from pipeline.mllm.neighbour_titles import load_neighbours
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompt_templates import Templates
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.saved_mllm import load_mllm
from pipeline.mllm.vision_cache import VisionCache

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


@dataclass(frozen=True)
class Exported:
    version: Version | None  # None: parts are left, to other --shard runs
    rows: int
    dim: int
    made: bool  # False: the published version already was of this model and catalogue
    work: ExportStats = field(default_factory=ExportStats)
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
            base = PreviousVersion(before, catalog.item_ids)
    elif update:
        notes.append("a full export: there is nothing to update yet")
    fingerprint = hashlib.sha256(canonical_json(facts | {"base": base and base.version.manifest_sha256})).hexdigest()
    facts["fingerprint"] = fingerprint
    bounds = range(0, len(catalog), config.export.shard_rows)
    parts = {f"part-{n:05d}.parquet": np.arange(first, min(first + bounds.step, len(catalog))) for n, first in enumerate(bounds)}
    skips = config.data.on_bad_image == "skip"
    claims = PartClaims(root, "embeddings", fingerprint, lambda path, name: is_part(path, catalog, parts[name], skips))
    with claims:
        if not claims.begin(pointer):
            return _export(config, run, data, update, share)

        mllm, backbone, _ = load_mllm(model.path, backbone_config, merge=True)
        if depth is not None:
            early_exit.stop_after(mllm, depth)
        if model.manifest["catalogue_sha256"] != catalog.sha256:
            # new items are welcome: their content is all the model needs
            facts["distilled_on_catalogue_sha256"] = model.manifest["catalogue_sha256"]
        # the features that `tpad distill` has cached, as far as they are of this vision tower and image budget
        vision_cache = VisionCache(run / "vision", backbone, backbone_config.max_pixels) if (run / "vision").is_dir() else None
        processor = PromptProcessor(backbone_config, backbone, catalog, cache_bytes=0, vision_cache=vision_cache)
        source = ItemBatches(
            catalog,
            Prompts(
                catalog,
                data_config.model_copy(update={"on_bad_image": "error"}),
                Templates.model_validate(settings["templates"]),
                neighbours,
            ),
            processor,
            config.export.token_budget,
            config.data.on_bad_image,
            COMPILED_LENGTHS if config.export.compile else 1,
        )
        exporter = Exporter(config.export, claims, parts, source, mllm, base, settings["dim"], halves)
        names = list(parts)[share[0] - 1 :: share[1]]
        exporter.run(names, wait=share == (1, 1))
    if left := claims.left(list(parts)):
        return Exported(None, len(catalog), settings["dim"], True, exporter.work, len(left), len(parts), notes)

    def finish() -> dict[str, Any]:
        folder = claims.staging.path
        manifest = manifest_of(folder, list(parts), facts, settings, model, source.views.shown, catalog if skips else None)
        if not manifest["rows"]:
            raise UserError(
                f"every item would be left out for its picture ({catalog.path}); replace them, or set data.on_bad_image to text_only", DATA
            )
        (folder / "README.md").write_text(card(manifest), encoding="utf-8")
        if config.export.format == "npy":
            write_arrays(folder, manifest)
        return manifest

    version = claims.publish(finish, config.export.keep)
    return Exported(version, version.manifest["rows"], settings["dim"], True, exporter.work, 0, len(parts), notes)


def layers_run(wanted: int | None, settings: dict[str, Any]) -> int | None:
    """The first so many layers of the MLLM's decoder; None: all of them."""
    if wanted is None:
        return None
    depth = len(settings.get("layers", []))
    if wanted > depth:
        raise UserError(f"the MLLM has {depth} measured layers (export.layers = {wanted}); give no more, or null for all", USAGE)
    return None if wanted == depth else wanted
