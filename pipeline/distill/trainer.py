"""The loop that trains the MLLM for one phase.

What a phase's steps hold and minimise is in `phases.py`. A gradient flows only where a feature was made, so the loss
times the number of processes undoes the averaging of distributed data parallel.
"""

import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.nn.parallel import DistributedDataParallel

from pipeline.core.checkpoint import Checkpoints, pack_optimizer, unpack_optimizer
from pipeline.core.config import PhaseConfig
from pipeline.core.errors import USAGE, UserError
from pipeline.core.interrupt import Interrupt
from pipeline.core.metrics_log import MetricsLog
from pipeline.core.prefetch import loaded_ahead
from pipeline.core.progress import Steps
from pipeline.distill import fsdp
from pipeline.distill.feature_table import item_features
from pipeline.distill.grad_cache import backward, features, look_once
from pipeline.distill.head_init import start_heads
from pipeline.distill.phases import DROPOUT, Critics, Phase, Tensors
from pipeline.mllm.model import Mllm, load_trainable, trainable_state
from pipeline.mllm.vision_tower import is_frozen


def train_phase(phase: Phase, mllm: Mllm, accelerator: Accelerator, checkpoints: Checkpoints, metrics: MetricsLog) -> None:
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
                tensors |= prefixed(f"critic/{name}/", found)
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
            critic.load(below(f"critic/{name}/", tensors), state["critics"][name])
    else:
        start_heads(phase, mllm)
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
            chunks, facts = send_to_device((chunks, facts), accelerator.device, non_blocking=True)
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


def learning_rate(settings: PhaseConfig, step: int) -> float:
    """Linear warm-up, then cosine decay to zero."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


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


def probe(phase: Phase, mllm: Mllm, facts: Tensors, critics: Critics) -> dict[str, float]:
    """The phase's bounds on items that are not in this step's batch, and that no critic has just learned from."""
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
