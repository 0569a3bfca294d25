"""Trains one session model, or a baseline model of the literature: loop, optimiser, checkpoints.

Every random draw is a function of (seed, epoch, step), so a killed run resumes to the same weights, and several processes (accelerate)
take the same steps as one, except for dropout inside the models of the literature, which each process draws for its share of the
batch. With `sbr.precision: bf16` matrix products are in bfloat16 under autocast; weights, optimiser state, logsumexp and losses stay in
float32.
"""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor

from pipeline.core.artifact import locked
from pipeline.core.checkpoint import SAVE_SECONDS, Checkpoints, pack_optimizer, unpack_optimizer
from pipeline.core.config import Config, SbrConfig
from pipeline.core.errors import USAGE, UserError, note
from pipeline.core.interrupt import Interrupt
from pipeline.core.process import keep_freed_memory
from pipeline.core.progress import Steps
from pipeline.data.availability import Availability
from recommender.baselines.registry import MODELS, Model
from recommender.baselines.sasrec import SASRec
from recommender.baselines.sequence_model import SequenceModel
from recommender.metrics.evaluator import limits_of, model_ranks
from recommender.metrics.ranks import NotANumber, summarise
from recommender.session_model.config import ModelConfig, Parts
from recommender.session_model.model import SessionModel
from recommender.session_model.negative_sampling import Candidates, draw_probabilities, drawn_evenly, everything, sampled
from recommender.session_model.windows import DeviceWindows, Windows, batches
from recommender.training.calibration import Calibration, calibrate
from recommender.training.dataset import TrainingData, model_fingerprint
from recommender.training.loss_log import Diverged, LossLog

SCALAR_RATE = 3.0  # learning rate of the biases and component weights of our model, relative to that of the matrices
MANY_ITEMS = 5_000  # larger catalogues use sampled candidates: a softmax over all items costs more than it gains
Watch = Callable[[list[float]], None]  # called after each epoch with the validation scores of all epochs so far


class Trained(NamedTuple):
    """The result of `train_model`."""

    model: Model  # with the weights of its best epoch
    epochs: int  # up to the best one
    calibration: Calibration | None  # None for a model of the literature
    seconds: float  # of the training with its validation, all parts of a resumed one


@dataclass
class Progress:
    """The content of a checkpoint beside the current weights and the optimiser state."""

    best: dict[str, Tensor]  # weights of the best epoch so far
    step: int = 0
    scores: list[float] = field(default_factory=list)  # of each epoch; higher is better
    over: bool = False
    seconds: float = 0.0

    @property
    def state(self) -> dict[str, Any]:
        return {"step": self.step, "scores": self.scores, "over": self.over, "seconds": self.seconds}


def make_accelerator() -> Accelerator:
    """Returns the accelerator of a training. Raises `UserError` (2) for another precision than float32 or bfloat16."""
    keep_freed_memory()
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise UserError(f"cannot train in {accelerator.mixed_precision} (accelerate launch --mixed_precision); use no or bf16", USAGE)
    return accelerator


def alone(folder: Path, accelerator: Accelerator) -> AbstractContextManager[None]:
    """Locks the folder. Raises `UserError` if another command is training in it."""
    return locked(folder) if accelerator.is_main_process else nullcontext()


def train_model(
    name: str,
    seed: int,
    config: Config,
    inputs: TrainingData,
    windows: tuple[Windows, Windows],
    accelerator: Accelerator,
    folder: Path,
    fresh: bool,
    watch: Watch | None = None,
    each_epoch: Callable[[int, Model], None] | None = None,
) -> Trained:
    """Trains a model on the first of `windows`; the second, validation, chooses its epoch and calibrates it.

    `watch` may stop the training by an exception; with it there is no calibration. `each_epoch` is called with the model after every epoch.
    Raises `UserError`, `Diverged` if the loss or the scores are not finite."""
    settings, valid = config.sbr, windows[1]
    model = build_model(name, seed, config, inputs)
    checkpoints = Checkpoints(folder / "checkpoints" / f"{name}-{seed}", model_fingerprint(name, seed, config, inputs))
    ranks = partial(gather_ranks, model, valid, accelerator, inputs.available_in_validation)

    def validate(epoch: int) -> float:
        if each_epoch is not None:
            each_epoch(epoch, model)
        try:
            return summarise(ranks())[settings.select]
        except NotANumber:
            raise Diverged(f"scores hold NaN ({name}, after epoch {epoch}); lower sbr.lr", USAGE) from None

    training = Training(name, seed, model, settings, windows[0], inputs.counts, inputs.available, accelerator, folder, checkpoints, fresh)
    progress = fit(training, settings.epochs, validate, watch)
    calibration = calibrate(model, valid, ranks) if isinstance(model, SessionModel) and watch is None else None
    return Trained(model, 1 + progress.scores.index(max(progress.scores)), calibration, progress.seconds)


def refit_model(
    name: str, seed: int, config: Config, inputs: TrainingData, accelerator: Accelerator, folder: Path, fresh: bool, epochs: int
) -> Model:
    """Trains a model on all sessions (the training part of `inputs`) for as many `epochs` as validation chose for its held-out twin, on
    the same schedule."""
    model = build_model(name, seed, config, inputs)
    fingerprint = f"{model_fingerprint(name, seed, config, inputs)} {epochs}"
    checkpoints = Checkpoints(folder / "checkpoints" / f"{name}-{seed}-refit", fingerprint)
    windows = inputs.windows(config.data.max_prefix)[0]
    training = Training(
        f"{name}, refit", seed, model, config.sbr, windows, inputs.counts, inputs.available, accelerator, folder, checkpoints, fresh
    )
    fit(training, epochs)
    return model


def fit(training: "Training", epochs: int, validate: Callable[[int], float] | None = None, watch: Watch | None = None) -> Progress:
    """Trains the model for at most `epochs` epochs of the schedule, and leaves it with the weights of the best epoch by `validate`, or of
    the last without it. Raises `Diverged`."""
    progress, accelerator, log = training.progress, training.accelerator, training.log
    if watch is not None and progress.scores:
        watch(progress.scores)
    with (
        Interrupt() as interrupt,
        Steps(f"{training.name} (seed {training.seed})", epochs * training.steps, progress.step, accelerator.is_main_process) as shown,
    ):
        while not progress.over:
            epoch, done = divmod(progress.step, training.steps)
            training.model.train()
            for number, which in enumerate(batches(len(training.windows), training.settings.batch, training.seed, epoch)):
                if number < done:
                    continue
                log.add(training.step(which, epoch, number))
                shown.advance(status(log.last, training.settings.select, progress.scores if validate is not None else []))
                if log.due and number + 1 < training.steps:
                    log.write()
                    stopped = interrupt.agreed(accelerator)
                    training.save(only_if_due=not stopped)
                    if stopped:
                        raise interrupt.exit()
            log.write()
            training.end_epoch(float(epoch) if validate is None else validate(epoch), epochs)
            training.save()
            if interrupt.agreed(accelerator):
                raise interrupt.exit()
            if watch is not None:
                watch(progress.scores)
    training.model.load_state_dict(progress.best, strict=False)
    return progress


class Training:
    """A model in training: its windows, optimiser, log and progress, which go on from the newest checkpoint; and one step at a time.

    `counts` (N,): training events of the items. `available`: when each item is, so that it is a negative only then; None: always.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        model: Model,
        settings: SbrConfig,
        windows: Windows,
        counts: np.ndarray,
        available: Availability | None,
        accelerator: Accelerator,
        folder: Path,
        checkpoints: Checkpoints,
        fresh: bool = False,
    ) -> None:
        self.name, self.seed, self.model, self.settings = name, seed, model, settings
        self.accelerator, self.checkpoints = accelerator, checkpoints
        if accelerator.is_main_process:
            checkpoints.tidy()
            drop_stale(checkpoints, name, seed, fresh)
        accelerator.wait_for_everyone()
        with warnings.catch_warnings():  # torch 2.13 renamed the argument, which accelerate does not know yet
            warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
            self.wrapped = accelerator.prepare(model)
        self.optimizer, self.names = build_optimizer(model, settings)
        self.progress = Progress(weights_of(model))
        if (checkpoint := checkpoints.newest()) is not None:
            with checkpoints.resuming():
                self._restore(*checkpoint[1:])
        self.windows, self.limits = DeviceWindows(windows, accelerator.device), limits_of(available, accelerator.device)
        self.share = share_sampled(settings, counts)
        self.steps = math.ceil(len(self.windows) / settings.batch)  # of an epoch
        self.log = LossLog(folder / "metrics.jsonl", name, seed, self.progress.step, self.steps, accelerator)
        self.saved = time.monotonic()
        self.began = self.saved - self.progress.seconds

    def step(self, which: np.ndarray, epoch: int, number: int) -> Tensor:
        """Trains one step on the windows `which`, split among the processes; returns the share of this process in the mean loss, ().

        All draws are seeded by the seed of the training, `epoch` and `number`, the step of the epoch."""
        accelerator, settings = self.accelerator, self.settings
        set_rate(self.optimizer, settings.lr * schedule(self.progress.step, self.steps * settings.epochs))
        rows, targets, times = self.windows.take(which)
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        seed = np.random.SeedSequence((self.seed, epoch, number)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        known = self.model.draw_known(generator)
        drawn = draw_candidates(self.model, torch.cat([rows, targets]), targets, settings, self.share, generator)
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            losses = self.wrapped(
                rows[mine], targets[mine], known, drawn.within(self.limits), generator, None if times is None else times[mine]
            )
        total: Tensor = losses.float().sum() / int(self.windows.cases[which].sum())
        self.optimizer.zero_grad()
        accelerator.backward(total * accelerator.num_processes)  # processes average their gradients
        self.optimizer.step()
        self.progress.step += 1
        return total.detach()

    def end_epoch(self, score: float, epochs: int) -> None:
        """Takes up the score of the epoch that ends; the training is over after `epochs`, or when none is better for `sbr.patience`."""
        progress = self.progress
        if score > max(progress.scores, default=-1.0):
            progress.best = weights_of(self.model)
        progress.scores.append(score)
        waited = len(progress.scores) - 1 - progress.scores.index(max(progress.scores))
        progress.over = len(progress.scores) >= epochs or waited >= self.settings.patience

    def save(self, only_if_due: bool = False) -> None:
        """Saves a checkpoint, from the main process; `only_if_due`: if the last one is some time ago."""
        self.progress.seconds = time.monotonic() - self.began
        if not self.accelerator.is_main_process or (only_if_due and time.monotonic() - self.saved <= SAVE_SECONDS):
            return
        moments, optimizer = pack_optimizer(self.optimizer, self.names)
        now, best = weights_of(self.model), self.progress.best
        tensors = {f"now/{name}": weight for name, weight in now.items()} | {f"best/{name}": weight for name, weight in best.items()}
        self.checkpoints.save(self.progress.step, tensors | moments, self.progress.state | {"optimizer": optimizer})
        self.saved = time.monotonic()

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"now/{name}"].view(parameter.shape))  # not broadcast
        unpack_optimizer(self.optimizer, self.names, tensors, state["optimizer"])
        best = {name: tensors[f"best/{name}"].to(p.device) for name, p in self.model.named_parameters()}
        seconds = state.get("seconds", 0.0)  # a checkpoint of an older tpad has none
        self.progress = Progress(best, state["step"], state["scores"], state["over"], seconds)


def drop_stale(checkpoints: Checkpoints, name: str, seed: int, fresh: bool) -> None:
    """Deletes checkpoints of other settings or data, and with `fresh` all."""
    if fresh:
        checkpoints.clear()
    elif checkpoints.drop_others():  # without a question to the user, as a training takes minutes
        note(f"note: {name} (seed {seed}) is trained anew: its checkpoint is of other settings or data, and dropped")


def status(loss: float, metric: str, scores: list[float]) -> str:
    """Returns the text of the progress bar: the last loss (NaN: none yet, as losses arrive some steps at a time) and the best score."""
    facts = [] if math.isnan(loss) else [f"loss {loss:.3f}"]
    return ", ".join([*facts, f"validation {metric} {max(scores):.4f}"] if scores else facts)


def share_sampled(settings: SbrConfig, counts: np.ndarray) -> Tensor | None:
    """Returns (N,) the probability that an item is drawn as a candidate; None: all items are candidates."""
    sampling = settings.loss == "sampled" or (settings.loss != "softmax" and len(counts) > MANY_ITEMS)
    return draw_probabilities(counts) if sampling else None


def draw_candidates(
    model: Model, shown: Tensor, targets: Tensor, settings: SbrConfig, share: Tensor | None, generator: torch.Generator
) -> Candidates:
    """Returns the candidates of a step. gBCE is used for SASRec alone, as in its paper; the other models use a softmax.

    `shown`: the items of the batch, targets too. `share` (N,): result of `share_sampled`."""
    if settings.loss == "gbce" and isinstance(model, SequenceModel) and isinstance(model.encoder, SASRec):
        return drawn_evenly(model.known, targets, settings.negatives, settings.calibration, generator)
    return everything(model.known) if share is None else sampled(share, shown, settings.negatives, generator)


def build_model(name: str, seed: int, config: Config, inputs: TrainingData) -> Model:
    """Builds an untrained model by its name, with weights drawn from the seed."""
    recipe, settings = MODELS[name], config.sbr
    content = inputs.content if recipe.content else None
    assert content is not None or not recipe.content
    torch.manual_seed(seed)
    if recipe.encoder is not None:
        sessions = inputs.split.train.rows, inputs.split.train.offsets
        of_both = settings.dim, config.data.max_prefix, settings.dropout, sessions
        return SequenceModel(recipe.encoder, inputs.counts, content, recipe.ids, *of_both)
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
    """Returns AdamW in up to three groups, and the names of its parameters.

    Groups: matrices; the content projection, whose decay keeps it from memorising uninformative dimensions of the vectors; scalars and
    vectors, without decay and, in our model, with a higher learning rate."""
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"weight_decay": settings.weight_decay, "rate": 1.0},
        "content": {"weight_decay": settings.content_decay, "rate": 1.0},
        "vectors": {"weight_decay": 0.0, "rate": SCALAR_RATE if isinstance(model, SessionModel) else 1.0},
    }
    members: dict[str, dict[str, torch.nn.Parameter]] = {group: {} for group in groups}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = "vectors" if parameter.ndim < 2 else "content" if name == "project.weight" else "matrices"
        members[group][name] = parameter
    grouped = [{"params": list(named.values()), **groups[group]} for group, named in members.items() if named]
    return torch.optim.AdamW(grouped, lr=settings.lr, fused=True), [name for named in members.values() for name in named]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate; each group has its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def schedule(step: int, steps: int) -> float:
    """Returns the factor of the learning rate at a step: a linear warm-up over 5 % of the steps, times a cosine to zero."""
    return min(1.0, (step + 1) / max(1, steps // 20)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def gather_ranks(model: Model, windows: Windows, accelerator: Accelerator, available: Availability | None) -> np.ndarray:
    """Returns `model_ranks` of all windows, which are split among the processes."""
    bounds = np.linspace(0, len(windows), accelerator.num_processes + 1).astype(int)
    index = accelerator.process_index
    ranks = model_ranks(model, windows.take(np.arange(bounds[index], bounds[index + 1])), available=available)
    return ranks if accelerator.num_processes == 1 else np.concatenate(gather_object([ranks]))


def weights_of(model: Model) -> dict[str, Tensor]:
    """Returns a copy of the parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
