"""Embeds every item of the catalogue with the unified MLLM and publishes the result as a version of `run/embeddings`.

`export` has three steps: plan what must be computed (`plan_export`), compute it (`exporter.py`) and publish it (`_publish`).

The catalogue is cut into parts of fixed rows. A part is computed by one process, in batches that do not cross its bounds
(`item_batches.py`), so its bytes depend neither on the number of processes nor on interruptions. Which process computes it is fixed
(`part_folder.py`), or Ray decides.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoConfig

from pipeline.core.artifact import Version, decoding, environment, open_verified, published
from pipeline.core.config import BackboneConfig, Config, DataConfig
from pipeline.core.errors import ARTIFACT, DATA, ENVIRONMENT, USAGE, UserError
from pipeline.core.files import canonical_json, read_json
from pipeline.core.process import keep_freed_memory, own_share
from pipeline.core.progress import Steps
from pipeline.core.ray_workers import on_ray
from pipeline.data.catalog import Catalog, load_catalog
from pipeline.data.embeddings import HALVES
from pipeline.export.card import card, manifest_of, write_arrays
from pipeline.export.exporter import Exporter, ExportStats, is_part
from pipeline.export.item_batches import ItemBatches
from pipeline.export.part_folder import PartFolder, clear_parts, current_pointer
from pipeline.export.server_engine import EmbeddingServer
from pipeline.export.unchanged_rows import PreviousVersion
from pipeline.mllm import prompts
from pipeline.mllm.item_vectors import VECTORS, table_sha256
from pipeline.mllm.model import Mllm, stop_after
from pipeline.mllm.neighbour_titles import Neighbours, load_neighbours
from pipeline.mllm.prompt_templates import Templates
from pipeline.mllm.saved_mllm import HINT, load_mllm
from pipeline.mllm.vector_prompts import processor_for, prompts_for
from pipeline.mllm.vision_cache import VisionCache

WAIT_SECONDS = 0.5  # between looks at the parts of other processes of a launcher, which ends all of them if one fails
COMPILED_LENGTHS = 32  # sequences are padded to multiples of this for torch.compile
RECIPE = {  # what an item's vector depends on beside its content -> its name in messages
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
    """The result of an export."""

    version: Version | None  # None: parts are left, for other --shard runs
    made: bool  # False: the published version was up to date
    work: ExportStats = field(default_factory=ExportStats)
    left: int = 0  # parts that do not exist yet
    parts: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What an export computes, from which model and items: all that is decided before the model is loaded."""

    model: Version
    settings: dict[str, Any]  # of the MLLM, as in its mllm.json
    backbone: BackboneConfig
    data: DataConfig  # as in training
    catalog: Catalog
    neighbours: Neighbours | None
    layers: int | None
    facts: dict[str, Any]  # manifest entries that identify the version, with its fingerprint
    pointer: bytes  # the file `current` before anything was read
    previous: PreviousVersion | None  # the version to update
    parts: dict[str, np.ndarray]  # file name -> rows
    notes: list[str]

    @property
    def halves(self) -> list[str]:
        """The halves of the embedding; an ablation may have one."""
        return [half for half in HALVES if half in self.settings["heads"]]


def export(
    config: Config, run: Path, data: Path, update: bool = False, share: tuple[int, int] | None = None, engine: str | None = None
) -> Exported:
    """Exports the item embeddings e(v) = [k(v) ; p(v)] of a data folder's items, by the MLLM of `run/mllm`. Raises `UserError`.

    `update` copies the vectors of unchanged items. `share` (i, n) computes the i-th of n fixed shares only, and publishes if it is the
    last; None: the share of this process under a launcher, which then waits for the others. `engine`: "ray", or the URL of a server.
    """
    keep_freed_memory()
    root = run / "embeddings"
    number, count = share or own_share()
    while True:
        plan = plan_export(config, run, data, update, engine)
        if isinstance(plan, Version):
            return Exported(plan, made=False)
        names, is_complete = list(plan.parts), partial(_is_complete, plan, config.data.on_bad_image == "skip")
        with environment(root), PartFolder(root, "embeddings", plan.facts["fingerprint"], count > 1, is_complete) as folder:
            if not folder.begin(plan.pointer):
                continue  # another process published meanwhile: plan again, from its version
            missing = folder.missing(names[number - 1 :: count])
            stats = ExportStats()
            if engine == "ray":
                with Steps("export", sum(len(plan.parts[name]) for name in missing)) as progress:
                    for n, (table, work) in on_ray(PartWorker, (config, run, data, update, plan.facts["fingerprint"]), missing):
                        folder.add(missing[n], table)
                        stats += work
                        progress.advance(by=len(table))
            elif missing:
                exporter = open_exporter(config, run, plan, folder.add, engine)
                exporter.run(missing)
                stats = exporter.stats
            while (left := folder.missing(names)) and share is None:
                time.sleep(WAIT_SECONDS)
            version = None if left else folder.publish(partial(_finish, config, plan, folder.staging.path), config.export.keep)
            return Exported(version, True, stats, len(left), len(names), plan.notes)


def _is_complete(plan: Plan, skips: bool, path: Path, name: str) -> bool:
    return is_part(path, plan.catalog, plan.parts[name], skips)


def plan_export(config: Config, run: Path, data: Path, update: bool, engine: str | None = None) -> Plan | Version:
    """Decides what must be computed. Returns the published version if it is up to date. Raises `UserError`."""
    root = run / "embeddings"
    model, catalog = open_verified(run / "mllm", "mllm", HINT), load_catalog(data, stream=True)
    with decoding(model.path, HINT):
        settings = read_settings(model)
        backbone = backbone_of(config, settings)
        layers = layers_run(config.export.layers, model.path)
        data_config = DataConfig.model_validate(settings["data"])
        neighbours = neighbours_of(config, settings, data_config, catalog, model)
        new_items = model.manifest["catalogue_sha256"] != catalog.sha256  # they need no new MLLM: their content is enough
        beside = {"distilled_on_catalogue_sha256": model.manifest["catalogue_sha256"]} if new_items else {}
    recipe = {
        "mllm_sha256": model.manifest_sha256,
        "prompts_version": prompts.VERSION,
        "dtype": config.export.dtype,
        "max_pixels": backbone.max_pixels,
        "layers": layers,
        "on_bad_image": config.data.on_bad_image,
        "neighbours": neighbours and neighbours.sha256,
    }
    layout = {name: getattr(config.export, name) for name in ("shard_rows", "token_budget", "format", "compile")}
    facts: dict[str, Any] = recipe | layout | {"attention": backbone.attention, "catalogue_sha256": catalog.sha256}
    if engine not in (None, "ray"):
        facts["engine"] = "server"  # whose sums may be in another order
    if backbone.name == VECTORS:
        facts["vectors_sha256"] = table_sha256(backbone)
    pointer = current_pointer(root)
    current = published(root, "embeddings", config.export.keep)
    if current is not None and not (update and catalog.by_path) and all(current.manifest.get(key) == fact for key, fact in facts.items()):
        clear_parts(root)
        return current
    previous, notes = version_to_update(current, recipe, catalog) if update else (None, [])
    base = previous and previous.version.manifest_sha256
    facts |= {"fingerprint": hashlib.sha256(canonical_json(facts | {"base": base})).hexdigest()} | beside
    bounds = range(0, len(catalog), config.export.shard_rows)
    parts = {f"part-{n:05d}.parquet": np.arange(first, min(first + bounds.step, len(catalog))) for n, first in enumerate(bounds)}
    return Plan(model, settings, backbone, data_config, catalog, neighbours, layers, facts, pointer, previous, parts, notes)


def read_settings(model: Version) -> dict[str, Any]:
    """Returns the settings of a published MLLM. Raises `UserError` (4) for one of other prompts."""
    settings: dict[str, Any] = read_json(model.path / "mllm.json")
    if settings["prompts"] != prompts.VERSION:
        raise UserError(
            f"the MLLM was trained with prompts of version {settings['prompts']} ({model.path}); run `tpad distill` again", ARTIFACT
        )
    return settings


def backbone_of(config: Config, settings: dict[str, Any]) -> BackboneConfig:
    """Returns the backbone of the training, with what may differ in the export: this machine need not be that of the training."""
    trained = BackboneConfig.model_validate(settings["backbone"])
    changed = {
        "max_pixels": config.export.max_pixels or trained.max_pixels,
        "attention": config.export.attention or trained.attention,
        "path": config.backbone.path or trained.path,
        "kernels": config.backbone.kernels,
    }
    if settings.get("backbone_sha256") and Path(config.backbone.name).is_dir():
        changed["name"] = config.backbone.name  # the folder may have moved; `load_mllm` compares its content
    return trained.model_copy(update=changed)


def neighbours_of(config: Config, settings: dict[str, Any], data: DataConfig, catalog: Catalog, model: Version) -> Neighbours | None:
    """Loads the neighbours that `config` names, to be shown as in the training. Raises `UserError` (2 or 4)."""
    run = config.data.neighbours.run
    if run is not None and settings.get("neighbours") is None:
        raise UserError(
            f"the MLLM was trained without neighbours (data.neighbours.run = {run}); set null, or run `tpad distill` with them", USAGE
        )
    return load_neighbours(data.neighbours.model_copy(update={"run": run}), catalog, model.manifest["sessions_sha256"])


def version_to_update(current: Version | None, recipe: dict[str, Any], catalog: Catalog) -> tuple[PreviousVersion | None, list[str]]:
    """Returns the published version whose unchanged rows can be kept; None and why not, where nothing can."""
    if current is None:
        return None, ["a full export: there is nothing to update yet"]
    if changed := [name for key, name in RECIPE.items() if current.manifest.get(key) != recipe[key]]:
        return None, [f"a full export, not an update: {' and '.join(changed)} changed"]
    with decoding(current.path, "run `tpad export-embeddings` without --update first"):
        return PreviousVersion(current, catalog.item_ids), []


class PartWorker:
    """Computes parts in a process of Ray. They are added where the command was given."""

    def __init__(self, config: Config, run: Path, data: Path, update: bool, fingerprint: str) -> None:
        keep_freed_memory()
        plan = plan_export(config, run, data, update)
        if isinstance(plan, Version) or plan.facts["fingerprint"] != fingerprint:
            raise UserError(
                f"a worker finds other items, embeddings or another MLLM ({run}); give all machines the same files", ENVIRONMENT
            )
        self.tables: dict[str, pa.Table] = {}
        self.exporter = open_exporter(config, run, plan, self.tables.__setitem__)

    def __call__(self, name: str) -> tuple[pa.Table, ExportStats]:
        self.exporter.stats = ExportStats()
        self.exporter.run([name], show=False)
        return self.tables.pop(name), self.exporter.stats


def open_exporter(config: Config, run: Path, plan: Plan, add: Callable[[str, pa.Table], None], engine: str | None = None) -> Exporter:
    """Loads the MLLM, its adapters merged, and returns what computes the parts."""
    with decoding(plan.model.path, HINT):
        mllm, backbone, _ = load_mllm(plan.model.path, plan.backbone, merge=True, catalog=plan.catalog)
        if plan.layers is not None:
            stop_after(mllm, plan.layers)
        # the features that `tpad distill` has cached, as far as they are of this vision tower and image budget
        vision_cache = VisionCache(run / "vision", backbone, plan.backbone.max_pixels) if (run / "vision").is_dir() else None
        source = ItemBatches(
            plan.catalog,
            prompts_for(plan.backbone)(
                plan.catalog,
                plan.data.model_copy(update={"on_bad_image": "error"}),
                Templates.model_validate(plan.settings["templates"]),
                plan.neighbours,
            ),
            processor_for(plan.backbone, backbone, plan.catalog, cache_bytes=0, vision_cache=vision_cache),
            config.export.token_budget,
            config.data.on_bad_image,
            COMPILED_LENGTHS if config.export.compile else 1,
        )
    server = None
    if engine not in (None, "ray"):
        if not isinstance(mllm, Mllm) or plan.backbone.name == VECTORS or plan.neighbours or plan.layers:
            fault = "two models, vectors of your own, neighbours or a part of the layers"
            raise UserError(f"a server has none of these: {fault} (--engine {engine}); export without --engine", USAGE)
        server = EmbeddingServer(engine, mllm.eval(), source, plan.halves)
        server.compare()
    return Exporter(config.export, add, plan.parts, source, mllm, plan.previous, plan.settings["dim"], plan.halves, server)


def _finish(config: Config, plan: Plan, folder: Path) -> dict[str, Any]:
    """Writes what is published beside the parts, and returns the manifest. Raises `UserError` (3)."""
    shown = [column for column in plan.data.text or [] if column in plan.catalog.columns]
    catalog = plan.catalog if config.data.on_bad_image == "skip" else None
    manifest = manifest_of(folder, list(plan.parts), plan.facts, plan.settings, plan.model, shown, catalog)
    if not manifest["rows"]:
        raise UserError(
            f"every item would be left out for its image ({plan.catalog.path}); replace them, or set data.on_bad_image to text_only",
            DATA,
        )
    (folder / "README.md").write_text(card(manifest), encoding="utf-8")
    if config.export.format == "npy":
        write_arrays(folder, manifest)
    return manifest


def layers_run(wanted: int | None, mllm: Path) -> int | None:
    """Checks `export.layers` against the depth of the published MLLM's decoder; None: all layers."""
    if wanted is None:
        return None
    depth = AutoConfig.from_pretrained(mllm, trust_remote_code=False).get_text_config(decoder=True).num_hidden_layers
    if wanted > depth:
        raise UserError(f"the MLLM has {depth} layers (export.layers = {wanted}); give no more, or null for all", USAGE)
    return None if wanted == depth else wanted
