"""The loop that trains the MLLM for one phase.

The sequences and losses of a phase are in `phases.py`. Every process computes the loss of the global batch from gathered features, but a
gradient flows only through the features of its own share. Distributed data parallel averages gradients over the processes, so the
loss is multiplied by their number.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipeline.core.checkpoint import Checkpoints, pack_optimizer, unpack_optimizer
from pipeline.core.distill_config import PhaseConfig
from pipeline.core.errors import USAGE, UserError
from pipeline.core.interrupt import Interrupt
from pipeline.core.metrics_log import MetricsLog
from pipeline.core.prefetch import loaded_ahead
from pipeline.core.progress import Steps
from pipeline.distill import fsdp
from pipeline.distill.feature_table import item_features
from pipeline.distill.grad_cache import Chunk, backward, features, precompute_vision
from pipeline.distill.head_init import start_heads
from pipeline.distill.phases import DROPOUT, Critics, Phase, Tensors
from pipeline.mllm.model import Mllm, load_trainable, trainable_state
from pipeline.mllm.vision_tower import is_frozen

TOKEN_SUMS = ("nll", "divergence")  # outputs that are sums over answer tokens, and enter the losses as means


def train_phase(phase: Phase, mllm: Mllm, accelerator: Accelerator, checkpoints: Checkpoints, metrics: MetricsLog) -> None:
    """Trains `mllm` in place, from the newest checkpoint if there is one, to the phase's last step."""
    steps, settings = phase.settings.steps, phase.config.distill
    training = Training(phase, mllm, accelerator, checkpoints)
    start = training.resume()
    metrics.resume(phase.name, start)
    loader = loaded_ahead(phase.__getitem__, range(start, steps), settings.workers)
    with Interrupt() as interrupt, Steps(phase.name, steps, start, accelerator.is_main_process) as progress:
        training.model.train()
        for step, (chunks, facts) in zip(range(start, steps), loader, strict=True):
            chunks, facts = send_to_device((chunks, facts), accelerator.device, non_blocking=True)
            losses = training.step(step, chunks, facts)
            values: dict[str, Any] = {name: value.detach() for name, value in losses.items()}
            values |= {f"{name}_bound": critic.value for name, critic in training.critics.items()}
            if is_due(step, settings.probe.every, steps):
                values |= probe(phase, mllm, facts, training.critics)
            metrics.log(phase.name, step, values)
            progress.advance(f"loss {float(values['loss']):.3f}")
            stop = interrupt.agreed(accelerator)
            if stop or is_due(step, settings.checkpoint_every, steps):
                training.save(step + 1)
            if stop:
                raise interrupt.exit()
    mllm.eval()


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether a step is the last of `every` steps, or of all. 0: never."""
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)


class Training:
    """One phase in training: model, optimiser and critics, a step of them, and their checkpoints."""

    def __init__(self, phase: Phase, mllm: Mllm, accelerator: Accelerator, checkpoints: Checkpoints) -> None:
        self.phase, self.mllm, self.accelerator, self.checkpoints = phase, mllm, accelerator, checkpoints
        groups = parameter_groups(mllm, phase.settings)
        self.trainable = trainable_state(mllm)
        self.names = [name for group in groups for name in group.pop("names")]  # in the optimiser's order
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(mllm, fsdp.sharded_weights(mllm))  # type: ignore[no-untyped-call]
        self.model, self.optimizer = accelerator.prepare(mllm, torch.optim.AdamW(groups, phase.settings.lr))
        self.critics = phase.critics()
        self.vision_is_frozen = is_frozen(mllm.backbone)
        self.seconds, self.began = 0.0, 0.0  # of training before this process, and when this one began

    def resume(self) -> int:
        """Loads the newest checkpoint, or else starts the new heads. Returns the step to go on from."""
        step = 0
        if (checkpoint := self.checkpoints.newest()) is None:
            start_heads(self.phase, self.mllm)
        else:
            step, tensors, state = checkpoint
            with self.checkpoints.resuming():
                self.seconds = float(state.get("seconds", 0.0))
                load_trainable(self.mllm, {name: tensors[name] for name in self.trainable}, str(self.checkpoints.folder))
                unpack_optimizer(self.optimizer.optimizer, self.names, tensors, state["optimizer"])
                for name, critic in self.critics.items():
                    critic.load(below(f"critic/{name}/", tensors), state["critics"][name])
        self.began = time.perf_counter()
        return step

    def save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            moments, optimizer_state = pack_optimizer(self.optimizer.optimizer, self.names)
            tensors, critic_states = trainable_state(self.mllm) | moments, {}
            for name, critic in self.critics.items():
                critic_tensors, critic_states[name] = critic.state()
                tensors |= prefixed(f"critic/{name}/", critic_tensors)
            seconds = self.seconds + time.perf_counter() - self.began
            state = {"optimizer": optimizer_state, "critics": critic_states, "seconds": round(seconds, 3)}
            self.checkpoints.save(step, tensors, state)
        self.accelerator.wait_for_everyone()

    def step(self, step: int, chunks: list[Chunk], facts: Tensors) -> Tensors:
        """Takes one optimiser step. Returns the losses, and their sum as "loss"."""
        phase, settings = self.phase, self.phase.settings
        dropout = phase.rng(step, phase.group.rank, use=DROPOUT)
        seeds = [int(dropout.integers(2**62)) for _ in chunks]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step) * group["factor"]
        outputs = self._forward(chunks, seeds)
        losses = phase.losses(outputs | self._token_means(outputs, chunks), facts, self.critics)
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            raise UserError(f"the loss is not finite ({phase.name}, step {step}); lower distill.{phase.name}.lr", USAGE)
        self._backward(chunks, seeds, loss, outputs)
        self.accelerator.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        self.mllm.keep_scale()
        return {"loss": loss} | losses

    def _forward(self, chunks: list[Chunk], seeds: Sequence[int]) -> Tensors:
        """The outputs of `Mllm` for this process's share: with a graph, or, of several chunks, as leaves (GradCache)."""
        if len(chunks) == 1:
            torch.manual_seed(seeds[0])
            outputs: Tensors = self.model(chunks[0], self.phase.heads)
            return outputs
        if self.vision_is_frozen:
            precompute_vision(self.mllm, chunks, self.accelerator)
        return features(self.mllm, chunks, self.phase.heads, seeds)

    def _token_means(self, outputs: Tensors, chunks: list[Chunk]) -> Tensors:
        """Divides the sums over answer tokens by the number of those tokens, both over all processes."""
        group, means = self.phase.group, {}
        for kind in TOKEN_SUMS:
            for name in self.phase.heads:
                if (key := f"{name}.{kind}") in outputs:
                    answers = sum(len(chunk[name]["answers"]) for chunk in chunks if name in chunk)
                    tokens = group.total(torch.tensor(answers, device=self.accelerator.device))
                    means[key] = group.total(outputs[key]) / tokens
        return means

    def _backward(self, chunks: list[Chunk], seeds: Sequence[int], loss: Tensor, outputs: Tensors) -> None:
        world = self.phase.group.world
        tie = torch.zeros_like(loss)
        if world > 1:  # a share without images does not use the vision tower, and the other processes wait for its gradients
            tie = 0.0 * torch.stack([weight.sum() for weight in self.trainable.values()]).sum()
        self.optimizer.zero_grad()
        if len(chunks) == 1:
            self.accelerator.backward((loss + tie) * world)
        else:
            backward(self.model, chunks, self.phase.heads, seeds, loss * world, outputs, tie, self.accelerator)


def learning_rate(settings: PhaseConfig, step: int) -> float:
    """Warms up linearly, then decays to zero along a cosine."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def parameter_groups(mllm: Mllm, settings: PhaseConfig) -> list[dict[str, Any]]:
    """Groups the trainable weights: weight decay on matrices only, and ten times the learning rate for the one logit scale."""
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


def probe(phase: Phase, mllm: Mllm, facts: Tensors, critics: Critics) -> dict[str, float]:
    """Measures the phase's bounds on items outside this step's batch, which no critic has just learned from."""
    rows = phase.unseen(facts)
    if len(rows) < 2:
        return {}
    mllm.eval()
    features = item_features(mllm, phase, rows, phase.heads["items"])
    mllm.train()
    return {f"held_out_{name}": value for name, value in phase.probe(features, torch.from_numpy(rows), critics).items()}


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def below(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
