"""Trains session models on published embeddings, or on ids alone, beside the baselines, and publishes one of them.

All have the same settings; the epoch of each is chosen on validation, the test sessions are ranked once. Every random
draw is a function of (seed, epoch, step), so a run that was killed goes on to the same weights, and several processes
(accelerate) take the same steps as one (but for dropout inside the models of the literature, which each process draws for
its own share of the batch). With `sbr.precision: bf16` matrix products are in bfloat16 under autocast; weights, their
optimiser, logsumexp and losses stay in float32.
"""

import hashlib
import itertools
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor

from pipeline.artifact import Version, canonical_json, locked, published, remove, stage
from pipeline.checkpoint import Checkpoints, Interrupt, pack_optimizer, unpack_optimizer
from pipeline.config import Config, SbrConfig
from pipeline.errors import ARTIFACT, USAGE, UserError
from pipeline.process import keep_freed_memory
from pipeline.progress import Steps
from recommender.candidates import drawn_evenly, everything, sampled, share_drawn
from recommender.evaluate import Metrics, buckets_of, cases_table, collect_results, model_ranks, print_results, read_ceiling
from recommender.index import empty_index
from recommender.inputs import SAME_VECTORS, Inputs, load_inputs, model_fingerprint
from recommender.metrics import NotANumber, summarise, summarise_buckets
from recommender.model import SessionModel
from recommender.models import MODELS, Model, chosen
from recommender.models.sequence import SequenceModel
from recommender.published import write_model
from recommender.sessions import DeviceWindows, Windows, batches
from recommender.settle import settle
from recommender.shape import ModelConfig, Parts
from recommender.steplog import Diverged, StepLog

SAMPLES = 200  # test sessions kept with the model: to try it, to show it, to measure its index
SCALAR_RATE = 3.0  # learning rate of our model's biases and weights of components, over that of the matrices
MANY_ITEMS = 5_000  # above, a softmax over all of them costs more than it gives
SAVE_SECONDS = 120.0  # between checkpoints, where an epoch takes longer
Watch = Callable[[list[float]], None]  # told the validation scores of the epochs so far, each time there is one more


@dataclass(frozen=True)
class SbrSummary:
    version: Version
    made: bool  # False: it was there already, from the same inputs and settings
    metrics: dict[str, Any]  # as in metrics.json


def train_sbr(config: Config, run: Path, data: Path, fresh: bool = False, trials: int = 0) -> SbrSummary:
    """From `run/embeddings`, where a model reads them, and the sessions of `data` to `run/sbr`; prints the table of results.
    With `trials`, so many settings of each model are tried first; those that a search has found stay, until `fresh`."""
    from recommender.search import forget, need_optuna, search, settings_for  # it calls `train_model`

    if trials:
        need_optuna()
    inputs = load_inputs(config, run, data)
    names, items = chosen(config.sbr.models), len(inputs.catalog)
    to_publish = "full" if "full" in names else "ID-only"
    check_index(to_publish, config.sbr, items)  # now, and not after the training
    accelerator = make_accelerator()
    folder = run / "sbr-train"
    with alone(folder, accelerator):
        if fresh and accelerator.is_main_process:
            forget(run)
        accelerator.wait_for_everyone()
        windows = inputs.windows(config.data.max_prefix)
        if trials:
            search(config, inputs, windows[:2], accelerator, run, trials)
        seeds = range(config.seed, config.seed + config.sbr.seeds)
        own = settings_for(names, config, inputs, run)
        prints = [model_fingerprint(name, seed, own[name], inputs) for name in names for seed in seeds]
        whole = hashlib.sha256(canonical_json(prints)).hexdigest()
        current = published(run / "sbr", "sbr")
        if current is not None and current.manifest["fingerprint"] == whole and not fresh:
            metrics = json.loads((current.path / "metrics.json").read_text(encoding="utf-8"))
            if accelerator.is_main_process:
                print_results(metrics)
                if (built := current.manifest["index"]["setting"]) != config.sbr.index:
                    print(f"note: its index is still {built}; run `tpad index` for sbr.index {config.sbr.index}", file=sys.stderr)
            return SbrSummary(current, False, metrics)
        buckets = buckets_of(windows[2], inputs.counts)
        runs: dict[str, list[Metrics]] = {}
        ranks: dict[str, np.ndarray] = {}  # of the first seed
        best: SessionModel | None = None
        check_index(to_publish, own[to_publish].sbr, items)
        for name, seed in itertools.product(names, seeds):
            model = train_model(name, seed, own[name], inputs, windows[:2], accelerator, folder, fresh)
            found = gather_ranks(model, windows[2], accelerator)
            ranks.setdefault(name, found)
            runs.setdefault(name, []).append(summarise_buckets(found, buckets))
            if name == to_publish and best is None:
                assert isinstance(model, SessionModel)
                best = model
        assert best is not None
        if accelerator.is_main_process:
            ceiling = read_ceiling(data, config.data)
            metrics = collect_results(inputs.split, inputs.counts, windows[2], buckets, runs, ceiling)
            cases = cases_table(windows[2], inputs.split.test, inputs.catalog.item_ids, ranks)
            version = publish(run, own[to_publish], inputs, best, metrics, cases, whole)
            remove(folder / "checkpoints")
            print_results(metrics)
        accelerator.wait_for_everyone()
        if not accelerator.is_main_process:
            version = published(run / "sbr", "sbr") or _missing(run)
            metrics = json.loads((version.path / "metrics.json").read_text(encoding="utf-8"))
        return SbrSummary(version, True, metrics)


def check_index(name: str, settings: SbrConfig, items: int) -> None:
    """Refuses an index that cannot be built over the vectors of a model's channels: see `build_indexes`."""
    for more in (1, 2) if MODELS[name].content else (1,):
        empty_index(settings.index, items, settings.dim + more)


def _missing(run: Path) -> Version:
    raise UserError(f"session model was not published ({run / 'sbr'}); see the main process", ARTIFACT)


# --- training


def alone(folder: Path, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Refuses a second command that would train in the same folder."""
    return locked(folder) if accelerator.is_main_process else nullcontext()


def make_accelerator() -> Accelerator:
    keep_freed_memory()
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"no training in {accelerator.mixed_precision} (accelerate launch --mixed_precision); take no or bf16", USAGE)
    return accelerator


def train_model(
    name: str,
    seed: int,
    config: Config,
    inputs: Inputs,
    windows: tuple[Windows, Windows],
    accelerator: Accelerator,
    folder: Path,
    fresh: bool,
    watch: Watch | None = None,
    each_epoch: Callable[[int, Model], None] | None = None,
) -> Model:
    """One model, with the weights of its best epoch on validation. `watch` may stop the training by raising; `each_epoch` is
    shown every epoch's weights."""
    settings = config.sbr
    model = build_model(name, seed, config, inputs)
    checkpoints = Checkpoints(folder / "checkpoints" / f"{name}-{seed}", model_fingerprint(name, seed, config, inputs))
    if accelerator.is_main_process:
        if fresh:
            checkpoints.clear()
        elif checkpoints.drop_others():  # a training takes minutes, so that is no question for the user
            print(f"note: {name} (seed {seed}) is trained anew: its checkpoint is of other settings or data, and dropped", file=sys.stderr)
    accelerator.wait_for_everyone()
    with warnings.catch_warnings():  # torch 2.13 has a new name for it, which accelerate cannot pass on yet
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        wrapped = accelerator.prepare(model)
    optimizer, names = build_optimizer(model, settings)
    state: dict[str, Any] = {"step": 0, "scores": [], "over": False}  # of each epoch: `settings.select` on validation
    best = weights_of(model)
    found = checkpoints.newest()
    if found is not None:
        best = restore(model, optimizer, names, found[1], found[2])
        state = {key: found[2][key] for key in state}
        if watch is not None and state["scores"]:
            watch(state["scores"])
    train, valid = DeviceWindows(windows[0], accelerator.device), windows[1]
    share = share_sampled(settings, inputs.counts)
    steps = math.ceil(len(train) / settings.batch)
    log = StepLog(folder / "metrics.jsonl", name, seed, state["step"], steps, accelerator)
    saved = time.monotonic()
    with (
        Interrupt() as interrupt,
        Steps(f"{name} (seed {seed})", settings.epochs * steps, state["step"], accelerator.is_main_process) as shown,
    ):
        while not state["over"]:
            epoch, begin = divmod(state["step"], steps)
            model.train()
            for number, which in enumerate(batches(len(train), settings.batch, seed, epoch)):
                if number < begin:
                    continue
                set_rate(optimizer, settings.lr * schedule(state["step"], steps * settings.epochs))
                log.add(train_step(wrapped, model, optimizer, train, which, (seed, epoch, number), accelerator, settings, share))
                state["step"] += 1
                known = [] if math.isnan(log.last) else [f"loss {log.last:.3f}"]  # it comes a few steps at a time
                known += [f"validation {settings.select} {max(state['scores']):.4f}"] if state["scores"] else []
                shown.advance(", ".join(known))
                if log.due and number + 1 < steps:
                    log.write()
                    stopped = interrupt.agreed(accelerator)
                    if accelerator.is_main_process and (stopped or time.monotonic() - saved > SAVE_SECONDS):
                        save(checkpoints, model, best, optimizer, names, state)
                        saved = time.monotonic()
                    if stopped:
                        raise interrupt.exit()
            log.write()
            if each_epoch is not None:
                each_epoch(epoch, model)
            try:
                score = summarise(gather_ranks(model, valid, accelerator))[settings.select]
            except NotANumber:
                raise Diverged(f"scores hold NaN ({name}, after epoch {epoch}); lower sbr.lr", USAGE) from None
            if score > max(state["scores"], default=-1.0):
                best = weights_of(model)
            state["scores"].append(score)
            waited = epoch - state["scores"].index(max(state["scores"]))
            state["over"] = epoch + 1 == settings.epochs or waited >= settings.patience
            if accelerator.is_main_process:
                save(checkpoints, model, best, optimizer, names, state)
                saved = time.monotonic()
            if interrupt.agreed(accelerator):
                raise interrupt.exit()
            if watch is not None:
                watch(state["scores"])
    model.load_state_dict(best, strict=False)
    if isinstance(model, SessionModel) and watch is None:
        settle(model, partial(gather_ranks, model, valid, accelerator))
    return model


def share_sampled(settings: SbrConfig, counts: np.ndarray) -> Tensor | None:
    """(N,) how likely an item is drawn as a candidate; None: all are candidates."""
    sampling = settings.loss == "sampled" or (settings.loss == "auto" and len(counts) > MANY_ITEMS)
    return share_drawn(counts) if sampling else None


def build_model(name: str, seed: int, config: Config, inputs: Inputs) -> Model:
    recipe, settings = MODELS[name], config.sbr
    content = inputs.content if recipe.content else None
    assert content is not None or not recipe.content
    torch.manual_seed(seed)
    if recipe.encoder is not None:
        return SequenceModel(recipe.encoder, inputs.counts, content, recipe.ids, settings.dim, config.data.max_prefix, settings.dropout)
    shape = ModelConfig(
        items=len(inputs.catalog),
        content_dim=0 if content is None else content.shape[1],
        ids=recipe.ids,
        dim=settings.dim,
        max_prefix=config.data.max_prefix,
        id_dropout=settings.id_dropout,
        own_loss=settings.own_loss,
        parts=Parts(**settings.parts.model_dump(exclude={"whitening"})),
    )
    return SessionModel(shape, content, inputs.split.train.rows, inputs.split.train.offsets)


def build_optimizer(model: Model, settings: SbrConfig) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW in up to three groups, and the parameters' names: matrices; the one that reads the vectors, whose decay is what keeps the
    many numbers that tell nothing of sessions from being learned by heart; scalars and vectors, without decay and, of our model, at a
    higher rate."""
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"weight_decay": settings.weight_decay, "rate": 1.0},
        "content": {"weight_decay": settings.content_decay, "rate": 1.0},
        "vectors": {"weight_decay": 0.0, "rate": SCALAR_RATE if isinstance(model, SessionModel) else 1.0},
    }
    members: dict[str, dict[str, torch.nn.Parameter]] = {group: {} for group in groups}
    for name, parameter in model.named_parameters():
        group = "vectors" if parameter.ndim < 2 else "content" if name == "project.weight" else "matrices"
        members[group][name] = parameter
    grouped = [{"params": list(of.values()), **groups[group]} for group, of in members.items() if of]
    return torch.optim.AdamW(grouped, lr=settings.lr, fused=True), [name for of in members.values() for name in of]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a warm-up over 5 % of the steps, then a cosine to zero."""
    return min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_step(
    wrapped: torch.nn.Module,
    model: Model,
    optimizer: torch.optim.Optimizer,
    train: DeviceWindows,
    which: np.ndarray,
    draw: tuple[int, int, int],
    accelerator: Accelerator,
    settings: SbrConfig,
    share: Tensor | None,
) -> Tensor:
    """One step on the windows `which`, of which each process takes its share; returns that share's part of the mean loss, ().
    `share` (N,): how likely an item is drawn as a candidate of a softmax; None: all are."""
    rows, targets = train.take(which)
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(draw).generate_state(1)[0]))
    known = model.draw_known(generator)
    if settings.loss == "gbce":
        candidates = drawn_evenly(model.known, targets, settings.negatives, settings.calibration, generator)
    else:
        candidates = everything(model.known) if share is None else sampled(share, torch.cat([rows, targets]), settings.negatives, generator)
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        losses = wrapped(rows[mine], targets[mine], known, candidates, generator)
    total: Tensor = losses.float().sum() / int(train.cases[which].sum())
    optimizer.zero_grad()
    accelerator.backward(total * accelerator.num_processes)  # processes average their gradients
    optimizer.step()
    return total.detach()


def gather_ranks(model: Model, windows: Windows, accelerator: Accelerator) -> np.ndarray:
    """`model_ranks` of all windows, each process ranking a stretch of them."""
    bounds = np.linspace(0, len(windows), accelerator.num_processes + 1).astype(int)
    index = accelerator.process_index
    own = model_ranks(model, windows.take(np.arange(bounds[index], bounds[index + 1])))
    return own if accelerator.num_processes == 1 else np.concatenate(gather_object([own]))


def weights_of(model: Model) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def save(
    checkpoints: Checkpoints,
    model: Model,
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    names: list[str],
    state: dict[str, Any],
) -> None:
    moments, packed = pack_optimizer(optimizer, names)
    tensors = {f"now/{n}": w for n, w in weights_of(model).items()} | {f"best/{n}": w for n, w in best.items()} | moments
    checkpoints.save(state["step"], tensors, state | {"optimizer": packed})


def restore(
    model: Model, optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor], state: dict[str, Any]
) -> dict[str, Tensor]:
    """Puts a checkpoint back; returns the weights of the best epoch so far."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"now/{name}"])
    unpack_optimizer(optimizer, names, tensors, state["optimizer"])
    return {name: tensors[f"best/{name}"].to(p.device) for name, p in model.named_parameters()}


# --- publishing


def publish(
    run: Path, config: Config, inputs: Inputs, model: SessionModel, metrics: dict[str, Any], ranks: pa.Table, fingerprint: str
) -> Version:
    """`config` is what the model was trained with, `fingerprint` that of all models of the run."""
    reads = model.config.content_dim > 0  # else embeddings that another model of the run has read are nothing to this one
    embeddings, whitening = (inputs.embeddings, inputs.whitening) if reads else (None, {})
    manifest = {
        "fingerprint": fingerprint,
        "embeddings_manifest_sha256": embeddings and embeddings.manifest_sha256,
        "embeddings_version": embeddings and embeddings.name,
        "vectors": embeddings and {key: embeddings.manifest.get(key) for key in SAME_VECTORS},
        "catalogue_sha256": inputs.catalog.sha256,
        "skipped": inputs.embeddings.manifest.get("skipped", []) if inputs.embeddings else [],
        "sessions_sha256": inputs.split.train.ids_sha256(),
        "settings": config.sbr.model_dump() | {"seed": config.seed},
        "model": asdict(model.config),
    }
    test = inputs.split.test
    samples = [[inputs.catalog.item_ids[row] for row in test.session(i)[-config.data.max_prefix :]] for i in range(min(len(test), SAMPLES))]
    with stage(run / "sbr", "sbr") as staging:
        manifest["index"] = write_model(staging.path, model, inputs.catalog, inputs.counts, samples, whitening, config.sbr.index)
        (staging.path / "metrics.json").write_bytes(canonical_json(metrics))
        pq.write_table(ranks, staging.path / "ranks.parquet", write_page_checksum=True)
        return staging.publish(manifest)
