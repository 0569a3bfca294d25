"""The loop that trains the MLLM, phase after phase, and the unified MLLM that comes out.

What a phase's steps hold and minimise is in `phases.py`. A gradient flows only where a feature was made, so the loss
times the number of processes undoes the averaging of distributed data parallel.
"""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import patch_environment
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline import fsdp, layers, prompts
from pipeline.artifact import canonical_json, locked, published, stage
from pipeline.backbone import TOKENIZER, Backbone, build_backbone, weights_sha256
from pipeline.batches import cut
from pipeline.catalog import load_catalog
from pipeline.checkpoint import Checkpoints, Interrupt, pack_optimizer, unpack_optimizer
from pipeline.chunks import Chunk, backward, features, look_once
from pipeline.config import Config, PhaseConfig
from pipeline.encoder import Encoder
from pipeline.errors import ENVIRONMENT, USAGE, UserError
from pipeline.loading import loaded_ahead, telling_of_dead_workers
from pipeline.mllm import Mllm, SideBySide, embed_batches, load_trainable, save_mllm, trainable_state
from pipeline.neighbours import load_neighbours
from pipeline.phases import DROPOUT, PHASES, Align, Critics, Group, Knowledge, Phase, Teacher, Tensors, Transfer
from pipeline.process import keep_freed_memory
from pipeline.progress import Steps
from pipeline.prompts import Prompts, check_columns
from pipeline.session_log import SessionLog, load_sessions
from pipeline.split import split_sessions
from pipeline.steplog import Metrics, flat
from pipeline.summaries import write_summaries
from pipeline.templates import load_templates
from pipeline.variants import VARIANTS, merged, side_by_side, varied
from pipeline.vision import Cache, Picture, is_frozen, pack_attention

OpenTeacher = Callable[[Path, list[str], SessionLog], Teacher]  # of a run folder, item_ids, and the training sessions

LOCK_SECONDS = 10.0  # for so long the workers of a process that was killed may hold its lock
TABLE_ROWS = 4096  # items embedded at a time for a table


def learning_rate(settings: PhaseConfig, step: int) -> float:
    """Linear warm-up, then cosine decay to zero."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def train_phase(phase: Phase, mllm: Mllm, accelerator: Accelerator, checkpoints: Checkpoints, metrics: Metrics) -> None:
    """Trains `mllm` in place, from the newest checkpoint if there is one, to the phase's last step."""
    settings, every, group = phase.settings, phase.config.distill.checkpoint_every, phase.group
    groups = parameter_groups(mllm, settings)
    named = trainable_state(mllm)
    names = [name for group_ in groups for name in group_.pop("names")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(mllm, fsdp.pieces(mllm))  # type: ignore[no-untyped-call]
    model, optimizer = accelerator.prepare(mllm, torch.optim.AdamW(groups, settings.lr))
    critics = phase.critics()
    frozen = is_frozen(mllm.backbone)

    def save(step: int) -> None:
        if accelerator.is_main_process:
            moments, state = pack_optimizer(optimizer.optimizer, names)
            tensors, states = trainable_state(mllm) | moments, {}
            for name, critic in critics.items():
                found, states[name] = critic.state()
                tensors |= _prefixed(f"critic/{name}/", found)
            spent = seconds + time.perf_counter() - began
            checkpoints.save(step, tensors, {"optimizer": state, "critics": states, "seconds": round(spent, 3)})
        accelerator.wait_for_everyone()

    start, seconds = 0, 0.0
    if (found := checkpoints.newest()) is not None:
        start, tensors, state = found
        seconds = state.get("seconds", 0.0)
        load_trainable(mllm, {name: tensors[name] for name in named}, str(checkpoints.folder))
        unpack_optimizer(optimizer.optimizer, names, tensors, state["optimizer"])
        for name, critic in critics.items():
            critic.load(_below(f"critic/{name}/", tensors), state["critics"][name])
    else:
        centre_heads(phase, mllm)
    began = time.perf_counter()
    metrics.resume(phase.name, start)
    loader = loaded_ahead(phase.__getitem__, range(start, settings.steps), phase.config.distill.workers)
    with Interrupt() as interrupt, Steps(phase.name, settings.steps, start, accelerator.is_main_process) as progress:
        model.train()
        for step, (chunks, facts) in zip(range(start, settings.steps), loader, strict=True):
            dropout = phase.rng(step, group.rank, use=DROPOUT)
            seeds = [int(dropout.integers(2**62)) for _ in chunks]
            for group_ in optimizer.param_groups:
                group_["lr"] = learning_rate(settings, step) * group_["factor"]
            chunks, facts = [_to(chunk, accelerator.device) for chunk in chunks], _to(facts, accelerator.device)
            if len(chunks) == 1:
                torch.manual_seed(seeds[0])
                made: Tensors = model(chunks[0], phase.heads)
            else:
                if frozen:
                    look_once(mllm, chunks, accelerator)
                made = features(mllm, chunks, phase.heads, seeds)
            out = dict(made)
            for of in ("nll", "divergence"):
                for name in phase.heads:
                    if f"{name}.{of}" in out:  # mean over the answer tokens of all processes
                        answers = sum(len(chunk[name]["answers"]) for chunk in chunks if name in chunk)
                        tokens = group.total(torch.tensor(answers, device=accelerator.device))
                        out[f"{name}.{of}"] = group.total(out[f"{name}.{of}"]) / tokens
            losses = phase.losses(out, facts, critics)
            loss = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(loss):
                raise UserError(f"the loss is not finite ({phase.name}, step {step}); lower distill.{phase.name}.lr", USAGE)
            tie = torch.zeros_like(loss)
            if group.world > 1:  # a share without pictures leaves the vision tower out, which the other processes wait for
                tie = 0.0 * torch.stack([p.sum() for p in named.values()]).sum()
            optimizer.zero_grad()
            if len(chunks) == 1:
                accelerator.backward((loss + tie) * group.world)
            else:
                backward(model, chunks, phase.heads, seeds, loss * group.world, made, tie, accelerator)
            accelerator.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            mllm.keep_scale()
            values: dict[str, Any] = {name: value.detach() for name, value in ({"loss": loss} | losses).items()}
            values |= {f"{name}_bound": critic.value for name, critic in critics.items()}
            probing = phase.config.distill.probe.every
            if probing and ((step + 1) % probing == 0 or step + 1 == settings.steps):
                values |= probe(phase, mllm, facts, critics)
            metrics.log(phase.name, step, values)
            progress.advance(f"loss {float(loss.detach()):.3f}")
            stop = interrupt.agreed(accelerator)
            if stop or (step + 1) % every == 0 or step + 1 == settings.steps:
                save(step + 1)
            if stop:
                raise interrupt.exit()
    mllm.eval()


def probe(phase: Phase, mllm: Mllm, facts: Tensors, critics: Critics) -> dict[str, float]:
    """The phase's bounds on items that are not in this step's batch, and that no critic has just learned from."""
    rows = phase.unseen(facts)
    if len(rows) < 2:
        return {}
    mllm.eval()
    features = item_features(mllm, phase, rows, phase.heads["items"])
    mllm.train()
    return {f"held_out_{name}": value for name, value in phase.probe(features, torch.from_numpy(rows), critics).items()}


def parameter_groups(mllm: Mllm, settings: PhaseConfig) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not, and the one scale, on which a few steps must tell, learns ten times as fast."""
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"weight_decay": settings.weight_decay, "factor": 1.0},
        "vectors": {"weight_decay": 0.0, "factor": 1.0},
        "scale": {"weight_decay": 0.0, "factor": 10.0},
    }
    for group in groups.values():
        group |= {"params": [], "names": []}
    for name, parameter in trainable_state(mllm).items():
        group = groups["scale" if name == "log_scale" else "matrices" if parameter.ndim > 1 else "vectors"]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def centre_heads(phase: Phase, mllm: Mllm) -> None:
    """Centres the new heads on the features of the first step."""
    device = phase.group.accelerator.device
    chunks, facts = phase[0]
    reads: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for chunk in (_to(chunk, device) for chunk in chunks):
            for name, states in mllm.hidden(chunk).items():
                reads.setdefault(name, []).append(states[chunk[name]["read_at"]].float())
        for name, found in reads.items():
            read = torch.cat(found)
            if name == "items" and "candidates" in facts:  # without the repeated ones that only fill up the processes' shares
                read = read[: max(0, len(facts["candidates"]) - phase.group.rank * len(read))]
            for head in set(phase.heads[name]) & set(phase.new):
                raw = mllm.heads[head](read)
                count = torch.tensor(float(len(raw)), device=device)
                mllm.centre(head, phase.group.total(raw.sum(0)) / phase.group.total(count))


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _to(tensors: Any, device: torch.device) -> Any:
    return {name: _to(t, device) if isinstance(t, dict) else t.to(device, non_blocking=True) for name, t in tensors.items()}


# --- the stages


def distill(
    config: Config, run: Path, data: Path, fresh: bool = False, siblings: Sequence[Path] = (), open_teacher: OpenTeacher | None = None
) -> bool:
    """Both stages, from a data folder to `run/mllm`. False if the published MLLM was already made from the same inputs.

    A phase that one of the runs `siblings` has finished with the same settings and data is taken over from there.
    `open_teacher` gives the session model of another run, where `distill.transfer.teacher` names one.
    """
    variant, config = VARIANTS[config.distill.variant], varied(config)
    catalog = load_catalog(data)
    split = split_sessions(load_sessions(data, catalog), config.data)
    neighbours = load_neighbours(config.data.neighbours, catalog, split.train.ids_sha256())
    check_columns(catalog, config.data)
    views = Prompts(catalog, config.data, load_templates(config.data.prompts), neighbours)
    teacher = None
    if (named := config.distill.transfer.teacher) is not None:
        assert open_teacher is not None, "a teacher is named, and who opens it is not"
        teacher = open_teacher(Path(named), catalog.item_ids, split.train)
    made_from = weights_sha256(config.backbone)  # gigabytes to read: once
    prints = _fingerprints(config, views, teacher, catalog.sha256, _log_sha256(split.train), made_from)
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
        metrics = Metrics(folder / "metrics.jsonl", accelerator)
        encoder = Encoder(config.backbone, backbone, catalog)
        tables: Tensors = {}
        summaries: dict[str, str] = {}
        weights: dict[str, Tensors] = {}
        base = {f"backbone.{name}": weight.detach().clone() for name, weight in trainable_state(backbone.model).items()}
        if variant.frozen:
            backbone.model.requires_grad_(False)
        if config.distill.vision_cache_gb:
            keep_pictures(config, run, backbone, views, encoder, group)
        for kind, fingerprint in zip(PHASES, prints, strict=False):
            phase = kind(config, views, encoder, split.train, group, tables, teacher, summaries)
            torch.manual_seed(config.seed)
            heads = [head for of in kind.heads.values() for head in of]
            mllm = Mllm(backbone.model, heads, config.distill.dim)
            begin(mllm, kind, base, weights, config.distill.transfer.start)
            if kind is Align and config.distill.align.token_distill:
                mllm.teacher = _below("backbone.", weights["transfer"])
            checkpoints = Checkpoints(folder / kind.name, fingerprint)
            if fresh and accelerator.is_main_process:
                checkpoints.clear()
            elif accelerator.is_main_process:
                any(checkpoints.take_over(sibling / "distill" / kind.name, phase.settings.steps) for sibling in siblings)
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
            tables[head] = feature_table(mllm, phase, head)
        for name, parameter in backbone.model.named_parameters():
            parameter.requires_grad_(f"backbone.{name}" in base)  # frozen or not, they are published
        unified: Mllm | SideBySide = mllm
        if variant.published == "merge":
            config, unified = merged(config, backbone, base, weights)
        elif variant.published == "side_by_side":
            unified = side_by_side(backbone, weights, config.distill.dim)
        measured = measure_layers(unified, phase, metrics.before) if isinstance(unified, Mllm) else []
        if accelerator.is_main_process:
            publish(run, config, views, unified, backbone, made_from, measured, split.train.ids_sha256(), prints[-1])
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return True


def keep_pictures(config: Config, run: Path, backbone: Backbone, views: Prompts, encoder: Encoder, group: Group) -> None:
    """Every picture of the catalogue through the vision tower, each process its share, for `encoder` to read from there on."""
    if not is_frozen(backbone.model):
        if group.rank == 0:
            print("note: the vision tower trains, so nothing it makes is kept (distill.vision_cache_gb)", file=sys.stderr)
        return
    cache = encoder.kept = Cache(run / "vision", backbone, config.backbone.max_pixels)
    loading = Encoder(config.backbone, backbone, encoder.catalog, cache_bytes=0)
    rows = group.share(np.array([row for row in range(len(views)) if encoder.catalog.has_image(row)], np.int64))
    if group.rank == 0:
        cache.clear_others()
    group.accelerator.wait_for_everyone()
    room = (int(config.distill.vision_cache_gb * 1e9) - cache.size()) // group.world

    def load(row: int) -> Picture | None:
        return None if not views.has_image(row) or loading.key(row) in cache else loading.picture(row)

    if config.backbone.quantize is None:  # that is where it is already
        backbone.model.to(group.accelerator.device)
    cache.fill(backbone.model.eval(), load, rows, encoder.family.stack, room, config.distill.workers, group.rank == 0)
    group.accelerator.wait_for_everyone()
    cache.refresh()


def begin(mllm: Mllm, kind: type[Phase], base: Tensors, weights: dict[str, Tensors], transfer_start: str) -> None:
    """The weights a phase starts from: the base model's or K's; a new head starts as a copy of K's head."""
    state: Tensors = dict(base)
    if kind is Align or (kind is Transfer and transfer_start == "knowledge"):
        known = weights["knowledge"]
        head = _below("heads.knowledge.", known)
        state |= known | {f"heads.{new}.{name}": w for new in kind.new for name, w in head.items()}
    own = trainable_state(mllm)
    load_trainable(mllm, {name: state.get(name, own[name].detach()) for name in own}, kind.name)


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


def feature_table(mllm: Mllm, phase: Phase, head: str) -> Tensor:
    """(N, D): one feature an item."""
    count, parts = len(phase.prompts), []
    with Steps(f"{head} table", count, show=phase.group.rank == 0) as progress:
        for first in range(0, count, TABLE_ROWS):
            rows = np.arange(first, min(first + TABLE_ROWS, count))
            parts.append(item_features(mllm, phase, rows, (head,), phase.config.distill.workers)[head])
            progress.advance(by=len(rows))
    return torch.cat(parts)


def item_features(mllm: Mllm, phase: Phase, rows: np.ndarray, heads: tuple[str, ...], workers: int = 0) -> Tensors:
    """By head, the (n, D) features of items, each process embedding its share; the same tensors everywhere."""
    group, encoder, device = phase.group, phase.encoder, phase.group.accelerator.device
    own = group.share(np.resize(rows, math.ceil(len(rows) / group.world) * group.world))
    lengths = np.array([encoder.length(phase.prompts.item(int(row))) for row in own])
    places = cut(lengths, phase.config.export.token_budget)
    passes = [min(n, len(places) - 1) for n in range(group.most(len(places)))]  # as many as all other processes (`fsdp.py`)

    def load(number: int) -> Chunk:
        return encoder.collate({"items": [encoder.encode(phase.prompts.item(int(row))) for row in own[places[number]]]})

    found = embed_batches(mllm, places, loaded_ahead(load, passes, workers), heads, device)
    return {head: group.gather(torch.from_numpy(of).to(device))[: len(rows)] for head, of in found.items()}


def measure_layers(mllm: Mllm, phase: Phase, before: int) -> list[dict[str, float]]:
    """What each layer adds, on a fixed sample of items; said, and given to the trackers, a step each after the `before` of training."""
    config, accelerator = phase.config, phase.group.accelerator
    sequences = [phase.encoder.encode(phase.prompts.item(int(row))) for row in layers.sample(len(phase.prompts), config.seed)]
    mllm.to(accelerator.device).eval()
    measured = layers.measure(mllm, phase.encoder, sequences, config.export.token_budget, accelerator.device)
    if accelerator.is_main_process:
        layers.tell(measured)
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
