"""`tpad distill`: trains the three phases in order, each on the results of the earlier ones, and publishes the unified MLLM.

The phases are in `phases.py`, the training loop in `trainer.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import patch_environment

from pipeline.core.artifact import locked, published, stage
from pipeline.core.checkpoint import Checkpoints
from pipeline.core.config import Config
from pipeline.core.errors import ENVIRONMENT, USAGE, UserError, note
from pipeline.core.metrics_log import MetricsLog, flat
from pipeline.core.prefetch import telling_of_dead_workers
from pipeline.core.process import keep_freed_memory
from pipeline.data.catalog import load_catalog
from pipeline.data.session_log import SessionLog, load_sessions
from pipeline.data.split import split_sessions
from pipeline.distill import fsdp
from pipeline.distill.experimental.options import phase_options
from pipeline.distill.experimental.session_summaries import write_summaries
from pipeline.distill.experimental.soft_targets import Teacher
from pipeline.distill.feature_table import TABLE, feature_table
from pipeline.distill.fingerprints import fingerprints
from pipeline.distill.phases import PHASES, Align, Knowledge, Phase, Tensors
from pipeline.distill.process_group import Group
from pipeline.distill.trainer import below, train_phase
from pipeline.distill.variants import VARIANTS, Variant, merged, side_by_side, varied
from pipeline.distill.vision_features import fill_vision_cache
from pipeline.mllm.backbone import Backbone, build_backbone, folder_sha256
from pipeline.mllm.item_vectors import VECTORS
from pipeline.mllm.model import Mllm, SideBySide, load_trainable, trainable_state
from pipeline.mllm.neighbour_titles import load_neighbours
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompt_templates import load_templates
from pipeline.mllm.prompts import VERSION as PROMPTS_VERSION
from pipeline.mllm.prompts import Prompts, check_columns
from pipeline.mllm.saved_mllm import save_mllm
from pipeline.mllm.vector_prompts import processor_for, prompts_for
from pipeline.mllm.vision_tower import pack_attention

OpenTeacher = Callable[[Path, list[str], SessionLog], Teacher]  # arguments: a run folder, item_ids, the training sessions

TEXTS = 20_000  # texts that are counted where they are too long
LOCK_SECONDS = 10.0  # the workers of a killed process may hold its lock for this long


@dataclass(frozen=True)
class Inputs:
    """The data and settings of a distillation."""

    config: Config  # with the settings of its variant
    variant: Variant
    prompts: Prompts
    train: SessionLog
    teacher: Teacher | None
    backbone_sha256: str | None  # of its files in a local folder


@dataclass(frozen=True)
class Run:
    """The folders of a distillation, and the runs whose finished phases it may take over."""

    folder: Path
    siblings: Sequence[Path]
    fresh: bool  # start over


@dataclass(frozen=True)
class Machinery:
    """The processes and the backbone that all phases share."""

    group: Group
    backbone: Backbone
    processor: PromptProcessor
    base: Tensors  # the backbone's trainable weights before training
    metrics: MetricsLog

    @property
    def accelerator(self) -> Accelerator:
        return self.group.accelerator


@dataclass(frozen=True)
class PhaseResult:
    """A trained phase, as later phases and the publication use it."""

    mllm: Mllm
    weights: Tensors  # `trainable_state` at its end, copied
    tables: Tensors  # head -> (N, D) features of all items; empty for the last phase
    summaries: dict[str, str]  # session summaries by `summary_key`


def distill(
    config: Config,
    run: Path,
    data: Path,
    fresh: bool = False,
    siblings: Sequence[Path] = (),
    open_teacher: OpenTeacher | None = None,
    everything: bool = False,
) -> bool:
    """Distils a data folder into `run/mllm`. Returns False if the published MLLM was made from the same inputs already.

    With `everything`, all sessions are for training: for vectors that are published, and never evaluated. A phase that one of the runs
    `siblings` has finished with the same settings and data is taken over from there. `open_teacher` opens the session model of another
    run, where `distill.transfer.teacher` names one.
    """
    inputs = read_inputs(config, data, open_teacher, everything)
    hashes = fingerprints(inputs.config, inputs.prompts, inputs.train, inputs.teacher, inputs.backbone_sha256)
    version = published(run / "mllm", "mllm")
    if not fresh and version is not None and version.manifest["fingerprint"] == hashes[-1]:
        return False
    check_settings(inputs)
    keep_freed_memory()
    group, backbone = join_and_build(inputs, run)
    folder = run / "distill"
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder, patience=LOCK_SECONDS) if group.accelerator.is_main_process else nullcontext()
    with lock, telling_of_dead_workers():
        machinery = start(inputs, run, group, backbone)
        results: dict[str, PhaseResult] = {}
        for kind, fingerprint in zip(PHASES, hashes, strict=False):
            results[kind.name] = run_phase(kind, inputs, machinery, Run(run, siblings, fresh), fingerprint, results)
            if kind.name == inputs.variant.last:
                break
        published_config, unified = assemble(inputs, machinery, results)
        if group.accelerator.is_main_process:
            publish(run, published_config, inputs.prompts, unified, backbone, inputs.backbone_sha256, inputs.train.ids_sha256(), hashes[-1])
        group.accelerator.wait_for_everyone()
        group.accelerator.end_training()
    return True


def read_inputs(config: Config, data: Path, open_teacher: OpenTeacher | None, everything: bool) -> Inputs:
    variant, config = VARIANTS[config.distill.variant], varied(config)
    catalog = load_catalog(data)
    log = load_sessions(data, catalog)
    train = log if everything else split_sessions(log, config.data).train
    neighbours = load_neighbours(config.data.neighbours, catalog, train.ids_sha256())
    check_columns(catalog, config.data)
    prompts = prompts_for(config.backbone)(catalog, config.data, load_templates(config.data.prompts), neighbours)
    teacher = None
    if (teacher_run := config.distill.transfer.teacher) is not None:
        assert open_teacher is not None, "distill.transfer.teacher needs open_teacher"
        teacher = open_teacher(Path(teacher_run), catalog.item_ids, train)
    return Inputs(config, variant, prompts, train, teacher, folder_sha256(config.backbone))


def check_settings(inputs: Inputs) -> None:
    """Raises `UserError` for settings that do not fit the data or the environment."""
    settings = inputs.config.distill
    transfer = settings.transfer
    for option in ("summary", "intent", "teacher"):
        if getattr(transfer, option) and not transfer.sessions:
            raise UserError(f"distill.transfer.{option} needs session prompts (distill.transfer.sessions); give some", USAGE)
    if transfer.intent and not inputs.prompts.attributes:
        raise UserError("distill.transfer.intent needs item columns beside those of data.text (data.attributes); set it to 0", USAGE)
    known = [tracker.value for tracker in get_available_trackers()] + ["all"]
    for name in settings.log_with:
        if name not in known:
            raise UserError(f"no tracker `{name}` (distill.log_with); installed: {', '.join(known) or 'none'}", ENVIRONMENT)


def check_batches(config: Config, world: int) -> None:
    settings = config.distill
    amounts = {
        "knowledge.batch": settings.knowledge.batch,
        "transfer.sessions": settings.transfer.sessions,
        "align.batch": settings.align.batch,
    }
    for name, amount in amounts.items():
        if amount % world:
            raise UserError(f"distill.{name} = {amount} does not divide by {world} processes (config); make it a multiple", USAGE)


def join_and_build(inputs: Inputs, run: Path) -> tuple[Group, Backbone]:
    """Joins the processes of the launcher and builds the backbone, sharded where FSDP is wanted."""
    config = inputs.config
    shard = fsdp.wanted(config)
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # else Accelerate would shard the trainable weights too
        accelerator = Accelerator(log_with=config.distill.log_with or None, project_dir=run / "distill")
        if (precision := accelerator.mixed_precision) != "no":
            raise UserError(f"no training in {precision} (accelerate launch --mixed_precision); take no, and set backbone.dtype", USAGE)
        group = Group(accelerator)
        check_batches(config, group.world)
        backbone = build_backbone(config.backbone, inputs.prompts, config.seed)
    pack_attention(backbone.model, accelerator.device)
    if shard and group.world > 1:
        share = fsdp.shard(backbone.model, accelerator.device, group.world)
        if accelerator.is_main_process:
            note(f"FSDP: each of {group.world} processes holds {share:.0%} of the backbone's weights")
    return group, backbone


def start(inputs: Inputs, run: Path, group: Group, backbone: Backbone) -> Machinery:
    """Starts the trackers, and runs the vision tower in advance where its output is cached."""
    config, accelerator = inputs.config, group.accelerator
    accelerator.init_trackers("tpad", flat(config.model_dump(mode="json")))
    metrics = MetricsLog(run / "distill" / "metrics.jsonl", accelerator)
    base = {f"backbone.{name}": weight.detach().clone() for name, weight in trainable_state(backbone.model).items()}
    if inputs.variant.frozen:
        backbone.model.requires_grad_(False)
    cache = fill_vision_cache(config, run, backbone, inputs.prompts, group) if config.distill.vision_cache_gb else None
    processor = processor_for(config.backbone, backbone, inputs.prompts.catalog, vision_cache=cache)
    if accelerator.is_main_process and config.backbone.name != VECTORS:
        tell_of_cut_texts(processor, inputs.prompts)
    return Machinery(group, backbone, processor, base, metrics)


def tell_of_cut_texts(processor: PromptProcessor, prompts: Prompts) -> None:
    """Says how many items' texts are cut, of the first `TEXTS` in a large catalogue."""
    rows = range(min(len(prompts.catalog), TEXTS))
    longest = processor.config.max_text_tokens
    if cut := processor.cut_texts([prompts.text(row) for row in rows]):
        of = f"{len(rows):,} items" if len(rows) == len(prompts.catalog) else f"the first {len(rows):,} items"
        note(f"note: the texts of {cut:,} of {of} are cut at {longest} tokens; backbone.max_text_tokens raises that")


def run_phase(
    kind: type[Phase], inputs: Inputs, machinery: Machinery, run: Run, fingerprint: str, results: dict[str, PhaseResult]
) -> PhaseResult:
    """Trains one phase on the `results` of the earlier ones, then embeds all items for the later ones. Resumes from its checkpoints."""
    config, accelerator, folder = inputs.config, machinery.accelerator, run.folder / "distill"
    tables = {head: table for result in results.values() for head, table in result.tables.items()}
    summaries = {key: text for result in results.values() for key, text in result.summaries.items()}
    options = phase_options(kind.name, config, inputs.prompts, machinery.processor, inputs.teacher, summaries)
    frozen = inputs.variant.frozen or config.backbone.name == VECTORS
    phase = kind(config, inputs.prompts, machinery.processor, inputs.train, machinery.group, tables, options, frozen)
    torch.manual_seed(config.seed)
    heads = [head for names in kind.heads.values() for head in names]
    mllm = Mllm(machinery.backbone.model, heads, config.distill.dim)
    load_start(mllm, phase, machinery.base, results)
    if kind is Align and config.distill.align.token_distill:
        mllm.teacher = below("backbone.", results["transfer"].weights)
    checkpoints = Checkpoints(folder / kind.name, fingerprint)
    table_parts = Checkpoints(folder / kind.name / TABLE, fingerprint, keep=1)
    if accelerator.is_main_process:
        for finished, step in ((checkpoints, phase.settings.steps), (table_parts, len(inputs.prompts))):
            finished.tidy()
            find_finished(finished, step, run)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    train_phase(phase, mllm, accelerator, checkpoints, machinery.metrics)
    machinery.metrics.before += phase.settings.steps
    weights = {name: weight.detach().clone() for name, weight in trainable_state(mllm).items()}
    if kind.name == inputs.variant.last:
        return PhaseResult(mllm, weights, {}, {})
    summaries = {}
    if kind is Knowledge and config.distill.transfer.summary:
        summaries = write_summaries(mllm, phase, folder / "summaries.jsonl")
    head = heads[0] if kind is Knowledge else "transition"
    return PhaseResult(mllm, weights, {head: feature_table(mllm, phase, head, table_parts)}, summaries)


def find_finished(checkpoints: Checkpoints, step: int, run: Run) -> None:
    """Takes over the last checkpoint of a sibling run, or, for a fresh start, drops all checkpoints."""
    if run.fresh:
        checkpoints.clear()
    else:
        any(checkpoints.take_over(sibling / checkpoints.folder.relative_to(run.folder), step) for sibling in run.siblings)


def load_start(mllm: Mllm, phase: Phase, base: Tensors, results: dict[str, PhaseResult]) -> None:
    """Loads the weights that a phase starts from: the backbone's, or K's, with K's head copied into each new head.

    On a frozen backbone, where K and T read the same states, p begins as T's head of t(v).
    """
    state: Tensors = dict(base)
    if phase.from_knowledge:
        knowledge = results["knowledge"].weights
        head = below("heads.knowledge.", knowledge)
        state |= knowledge | {f"heads.{new}.{name}": weight for new in phase.new for name, weight in head.items()}
    if isinstance(phase, Align) and phase.frozen:
        transfer = results["transfer"].weights
        state |= {name: weight for name, weight in transfer.items() if name.startswith("heads.transition.")}
    initial = trainable_state(mllm)
    load_trainable(mllm, {name: state.get(name, initial[name].detach()) for name in initial}, phase.name)


def assemble(inputs: Inputs, machinery: Machinery, results: dict[str, PhaseResult]) -> tuple[Config, Mllm | SideBySide]:
    """Puts together the model that is published, and its config: the last phase's, or K and T united without alignment."""
    config, backbone, base = inputs.config, machinery.backbone, machinery.base
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(f"backbone.{name}" in base)  # a frozen variant publishes these too
    weights = {name: result.weights for name, result in results.items()}
    if inputs.variant.published == "merge":
        return merged(config, backbone, base, weights)
    if inputs.variant.published == "side_by_side":
        return config, side_by_side(backbone, weights, config.distill.dim)
    return config, results[inputs.variant.last].mllm


def publish(
    run: Path,
    config: Config,
    prompts: Prompts,
    mllm: Mllm | SideBySide,
    backbone: Backbone,
    backbone_sha256: str | None,
    sessions_sha256: str,
    fingerprint: str,
) -> None:
    """Publishes the unified MLLM as a version of `run/mllm`."""
    commit = getattr(backbone.model.config, "_commit_hash", None)  # a name on the hub may get other weights tomorrow
    settings = {
        "backbone": config.backbone.model_dump() | {"revision": config.backbone.revision or commit},
        "backbone_sha256": backbone_sha256,
        "data": config.data.model_dump(exclude={"neighbours": {"run"}, "prompts": True}) | {"text": prompts.shown},
        "neighbours": prompts.neighbours and prompts.neighbours.sha256,
        "dim": config.distill.dim,
        "heads": list(mllm.heads if isinstance(mllm, Mllm) else mllm.halves),
        "prompts": PROMPTS_VERSION,
        "templates": prompts.templates.model_dump(),
    }
    if isinstance(mllm, SideBySide):
        settings["side_by_side"] = True
    with stage(run / "mllm", "mllm") as staging:
        save_mllm(staging.path, mllm, backbone, settings)
        staging.publish({"fingerprint": fingerprint, "catalogue_sha256": prompts.catalog.sha256, "sessions_sha256": sessions_sha256})
