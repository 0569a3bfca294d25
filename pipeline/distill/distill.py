"""`tpad distill`: phase after phase is trained, each from what the one before found, and the unified MLLM published.

What a phase is, is in `phases.py`; the loop that trains one in `trainer.py`.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import patch_environment

from pipeline.core.artifact import locked, published, stage
from pipeline.core.checkpoint import Checkpoints
from pipeline.core.config import Config
from pipeline.core.errors import ENVIRONMENT, USAGE, UserError
from pipeline.core.files import canonical_json
from pipeline.core.metrics_log import MetricsLog, flat
from pipeline.core.prefetch import telling_of_dead_workers
from pipeline.core.process import keep_freed_memory
from pipeline.data.catalog import load_catalog
from pipeline.data.session_log import SessionLog, load_sessions
from pipeline.data.split import split_sessions
from pipeline.distill import fsdp
from pipeline.distill.experimental.session_summaries import write_summaries
from pipeline.distill.experimental.soft_targets import Teacher
from pipeline.distill.feature_table import TABLE, feature_table
from pipeline.distill.phases import PHASES, Align, Knowledge, Phase, Tensors, Transfer
from pipeline.distill.process_group import Group
from pipeline.distill.trainer import below, train_phase
from pipeline.distill.variants import VARIANTS, merged, side_by_side, varied
from pipeline.mllm import early_exit, prompts
from pipeline.mllm.backbone import Backbone, build_backbone, weights_sha256
from pipeline.mllm.item_images import ItemImages
from pipeline.mllm.model import Mllm, SideBySide, load_trainable, trainable_state
from pipeline.mllm.neighbour_titles import load_neighbours
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompt_templates import load_templates
from pipeline.mllm.prompts import Prompts, check_columns
from pipeline.mllm.saved_mllm import save_mllm
from pipeline.mllm.tiny_backbone import TOKENIZER
from pipeline.mllm.vision_cache import VisionCache
from pipeline.mllm.vision_tower import ImageInput, is_frozen, pack_attention

OpenTeacher = Callable[[Path, list[str], SessionLog], Teacher]  # of a run folder, item_ids, and the training sessions

LOCK_SECONDS = 10.0  # for so long the workers of a process that was killed may hold its lock


def distill(
    config: Config,
    run: Path,
    data: Path,
    fresh: bool = False,
    siblings: Sequence[Path] = (),
    open_teacher: OpenTeacher | None = None,
    everything: bool = False,
) -> bool:
    """Both stages, from a data folder to `run/mllm`. False if the published MLLM was already made from the same inputs. With
    `everything` all sessions are for training: for vectors that are published, and no figure is made with.

    A phase that one of the runs `siblings` has finished with the same settings and data is taken over from there.
    `open_teacher` gives the session model of another run, where `distill.transfer.teacher` names one.
    """
    variant, config = VARIANTS[config.distill.variant], varied(config)
    catalog = load_catalog(data)
    log = load_sessions(data, catalog)
    train = log if everything else split_sessions(log, config.data).train
    neighbours = load_neighbours(config.data.neighbours, catalog, train.ids_sha256())
    check_columns(catalog, config.data)
    views = Prompts(catalog, config.data, load_templates(config.data.prompts), neighbours)
    teacher = None
    if (named := config.distill.transfer.teacher) is not None:
        assert open_teacher is not None, "a teacher is named, and who opens it is not"
        teacher = open_teacher(Path(named), catalog.item_ids, train)
    made_from = weights_sha256(config.backbone)  # gigabytes to read: once
    prints = _fingerprints(config, views, teacher, catalog.sha256, _log_sha256(train), made_from)
    version = published(run / "mllm", "mllm")
    if not fresh and version is not None and version.manifest["fingerprint"] == prints[-1]:
        return False
    if config.distill.transfer.intent and not views.attributes:
        raise UserError("distill.transfer.intent needs item columns beside those of data.text (data.attributes); set it to 0", USAGE)
    for name in config.distill.log_with:
        if name not in (known := [tracker.value for tracker in get_available_trackers()] + ["all"]):
            raise UserError(f"no tracker `{name}` (distill.log_with); installed: {', '.join(known) or 'none'}", ENVIRONMENT)
    in_pieces = fsdp.wanted(config)
    keep_freed_memory()
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # by which Accelerate would cut what trains, too
        accelerator = Accelerator(log_with=config.distill.log_with or None, project_dir=run / "distill")
        if (precision := accelerator.mixed_precision) != "no":
            raise UserError(f"no training in {precision} (accelerate launch --mixed_precision); take no, and set backbone.dtype", USAGE)
        group = Group(accelerator)
        _check_batches(config, group.world)
        backbone = build_backbone(config.backbone, views, config.seed)
    pack_attention(backbone.model, accelerator.device)
    if in_pieces and group.world > 1:
        held = fsdp.cut(backbone.model, accelerator.device, group.world)
        if accelerator.is_main_process:
            print(f"FSDP: each of {group.world} processes holds {held:.0%} of the backbone's weights", file=sys.stderr)
    folder = run / "distill"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, patience=LOCK_SECONDS) if accelerator.is_main_process else nullcontext(), telling_of_dead_workers():
        accelerator.init_trackers("tpad", flat(config.model_dump(mode="json")))
        metrics = MetricsLog(folder / "metrics.jsonl", accelerator)
        tables: Tensors = {}
        summaries: dict[str, str] = {}
        weights: dict[str, Tensors] = {}
        base = {f"backbone.{name}": weight.detach().clone() for name, weight in trainable_state(backbone.model).items()}
        if variant.frozen:
            backbone.model.requires_grad_(False)
        cache = fill_vision_cache(config, run, backbone, views, group) if config.distill.vision_cache_gb else None
        encoder = PromptProcessor(config.backbone, backbone, catalog, vision_cache=cache)
        for kind, fingerprint in zip(PHASES, prints, strict=False):
            phase = kind(config, views, encoder, train, group, tables, teacher, summaries)
            torch.manual_seed(config.seed)
            heads = [head for of in kind.heads.values() for head in of]
            mllm = Mllm(backbone.model, heads, config.distill.dim)
            begin(mllm, phase, base, weights)
            if kind is Align and config.distill.align.token_distill:
                mllm.teacher = below("backbone.", weights["transfer"])
            checkpoints = Checkpoints(folder / kind.name, fingerprint)
            kept = Checkpoints(folder / kind.name / TABLE, fingerprint, keep=1)
            if accelerator.is_main_process:
                for of, whole in ((checkpoints, phase.settings.steps), (kept, len(views))):
                    if fresh:
                        of.clear()
                    else:
                        any(of.take_over(sibling / of.folder.relative_to(run), whole) for sibling in siblings)
            accelerator.wait_for_everyone()
            accelerator.free_memory()
            train_phase(phase, mllm, accelerator, checkpoints, metrics)
            metrics.before += phase.settings.steps
            weights[kind.name] = {name: weight.detach().clone() for name, weight in trainable_state(mllm).items()}
            if kind is Knowledge and variant.last != kind.name and config.distill.transfer.summary:
                summaries = write_summaries(mllm, phase, folder / "summaries.jsonl")
            if kind.name == variant.last:
                break
            head = heads[0] if kind is Knowledge else "transition"
            tables[head] = feature_table(mllm, phase, head, kept)
        for name, parameter in backbone.model.named_parameters():
            parameter.requires_grad_(f"backbone.{name}" in base)  # frozen or not, they are published
        unified: Mllm | SideBySide = mllm
        if variant.published == "merge":
            config, unified = merged(config, backbone, base, weights)
        elif variant.published == "side_by_side":
            unified = side_by_side(backbone, weights, config.distill.dim)
        measured = measure_layers(unified, phase, metrics.before) if isinstance(unified, Mllm) else []
        if accelerator.is_main_process:
            publish(run, config, views, unified, backbone, made_from, measured, train.ids_sha256(), prints[-1])
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return True


def fill_vision_cache(config: Config, run: Path, backbone: Backbone, views: Prompts, group: Group) -> VisionCache | None:
    """Runs the vision tower once for every image of the catalogue, each process for its share; None where the tower trains."""
    if not is_frozen(backbone.model):
        if group.rank == 0:
            print("note: the vision tower trains, so nothing it makes is kept (distill.vision_cache_gb)", file=sys.stderr)
        return None
    cache = VisionCache(run / "vision", backbone, config.backbone.max_pixels)
    images = ItemImages(config.backbone, backbone, views.catalog, memory_bytes=0)
    rows = group.share(np.array([row for row in range(len(views)) if views.catalog.has_image(row)], np.int64))
    if group.rank == 0:
        cache.clear_others()
    group.accelerator.wait_for_everyone()
    room = (int(config.distill.vision_cache_gb * 1e9) - cache.size()) // group.world

    def load(row: int) -> ImageInput | None:
        return None if not views.has_image(row) or images.key(row) in cache else images.get(row)

    if config.backbone.quantize is None:  # that is where it is already
        backbone.model.to(group.accelerator.device)
    cache.fill(backbone.model.eval(), load, rows, images.family.stack, room, config.distill.workers, group.rank == 0)
    group.accelerator.wait_for_everyone()
    cache.refresh()
    return cache


def begin(mllm: Mllm, phase: Phase, base: Tensors, weights: dict[str, Tensors]) -> None:
    """The weights a phase starts from: the base model's, or K's, a new head then as a copy of K's head."""
    state: Tensors = dict(base)
    if phase.from_knowledge:
        known = weights["knowledge"]
        head = below("heads.knowledge.", known)
        state |= known | {f"heads.{new}.{name}": w for new in phase.new for name, w in head.items()}
    own = trainable_state(mllm)
    load_trainable(mllm, {name: state.get(name, own[name].detach()) for name in own}, phase.name)


def _fingerprints(
    config: Config, views: Prompts, teacher: Teacher | None, catalogue: str, sessions: str, made_from: str | None
) -> list[str]:
    """Of each phase, and last of what is published: everything the weights depend on.

    How often it is saved, by how many processes it is made and in what chunks, and what is kept of the vision tower, is not part of it.
    """
    chain: dict[str, Any] = {
        "prompts": prompts.VERSION,
        "templates": views.templates.model_dump(),
        "seed": config.seed,
        "data": config.data.model_dump(exclude={"protocol", "valid", "test", "max_prefix", "neighbours", "prompts"}),
        "backbone": config.backbone.model_dump() | ({"tokenizer": TOKENIZER} if config.backbone.name == "tiny" else {}),
        "weights": made_from,
        "dim": config.distill.dim,
        "critic": config.distill.critic.model_dump(),
        "catalogue": catalogue,
        "sessions": sessions,
    }
    if views.neighbours is not None:
        chain["neighbours"] = views.neighbours.settings()
    variant = VARIANTS[config.distill.variant]
    if variant.frozen:
        chain["frozen"] = True
    found = []
    for kind in PHASES:
        chain[kind.name] = getattr(config.distill, kind.name).model_dump(exclude={"teacher"})
        if kind is Transfer:
            chain["teacher"] = teacher and teacher.sha256
        found.append(hashlib.sha256(canonical_json(chain)).hexdigest())
        if kind.name == variant.last:
            break
    if variant.last != Align.name:  # the same phases, and something else made of them
        chain["published"] = config.distill.merge.model_dump() if variant.published == "merge" else variant.published
        found.append(hashlib.sha256(canonical_json(chain)).hexdigest())
    return found


def _log_sha256(log: SessionLog) -> str:
    """Of the sessions with what is in them, which their ids, the hash manifests hold, do not tell."""
    return hashlib.sha256(log.ids_sha256().encode() + log.offsets.tobytes() + log.rows.tobytes()).hexdigest()


def _check_batches(config: Config, world: int) -> None:
    for kind in PHASES:
        batch = getattr(config.distill, kind.name).batch
        if batch % world:
            raise UserError(f"distill.{kind.name}.batch = {batch} does not divide by {world} processes (config); make it a multiple", USAGE)


def measure_layers(mllm: Mllm, phase: Phase, before: int) -> list[dict[str, float]]:
    """What each layer adds, on a fixed sample of items; said, and given to the trackers, a step each after the `before` of training."""
    config, accelerator = phase.config, phase.group.accelerator
    sequences = [phase.encoder.encode(phase.prompts.item(int(row))) for row in early_exit.sample(len(phase.prompts), config.seed)]
    mllm.to(accelerator.device).eval()
    measured = early_exit.measure(mllm, phase.encoder, sequences, config.export.token_budget, accelerator.device)
    if accelerator.is_main_process:
        early_exit.tell(measured)
    for n, layer in enumerate(measured, 1):
        accelerator.log({f"layers/{name}": value for name, value in layer.items()}, step=before + n)
    return measured


def publish(
    run: Path,
    config: Config,
    views: Prompts,
    mllm: Mllm | SideBySide,
    backbone: Backbone,
    made_from: str | None,
    measured: list[dict[str, float]],
    sessions: str,
    fingerprint: str,
) -> None:
    """The unified MLLM as a version of `run/mllm`, with the `weights_sha256` it was made from and what was measured of its layers."""
    commit = getattr(backbone.model.config, "_commit_hash", None)  # of a name on the hub, which may hold other weights tomorrow
    settings = {
        "backbone": config.backbone.model_dump() | {"revision": config.backbone.revision or commit},
        "weights_sha256": made_from,
        "data": config.data.model_dump(exclude={"neighbours": {"run"}, "prompts": True}),
        "neighbours": views.neighbours and views.neighbours.sha256,
        "dim": config.distill.dim,
        "heads": list(mllm.heads if isinstance(mllm, Mllm) else mllm.halves),
        "layers": measured,
        "prompts": prompts.VERSION,
        "templates": views.templates.model_dump(),
    }
    if isinstance(mllm, SideBySide):
        settings["side_by_side"] = True
    with stage(run / "mllm", "mllm") as staging:
        save_mllm(staging.path, mllm, backbone, settings)
        staging.publish({"fingerprint": fingerprint, "catalogue_sha256": views.catalog.sha256, "sessions_sha256": sessions})
