"""How the heads of a phase start: centred, and whitened where the backbone is a published one."""

import math

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor

from pipeline.core.prefetch import loaded_ahead
from pipeline.distill.phases import Phase, Tensors
from pipeline.mllm.model import Mllm, pooled

READS = 8  # features a dimension by which heads are whitened, at least where a phase has the steps
SMALLEST = 1e-9  # share of a direction in the states' variance, below which it is rounding


def start_heads(phase: Phase, mllm: Mllm) -> None:
    """New heads start with features that differ from item to item, as measured on the sequences of the first steps.

    All are centred, for hidden states share one large direction. Those of a published backbone have another, which tells what is
    withheld rather than what the item is: before a contrastive loss finds the rest, it makes all features equal, for good. So heads
    that read them start whitened, along their main directions (BERT-whitening, arXiv 2103.15316); but not copies of K's head,
    which has learned, nor those of the tiny model, whose states say nothing yet.
    """
    group, whiten = phase.group, phase.config.backbone.name != "tiny" and not phase.from_knowledge
    reads = first_reads(phase, mllm, math.ceil(READS * phase.config.distill.dim / phase.settings.batch) if whiten else 1)
    with torch.no_grad():
        if whiten:
            normed = F.layer_norm(reads["items"], reads["items"].shape[-1:]).double()
            count = group.total(torch.tensor(float(len(normed)), device=normed.device))
            mean = group.total(normed.sum(0)) / count
            directions = whitening(group.total(normed.T @ normed) / count - mean.outer(mean), phase.config.distill.dim)
        for name, read in reads.items():
            for head in set(phase.heads[name]) & set(phase.new):
                if whiten:
                    mllm.turn(head, directions)
                raw = mllm.heads[head](read)
                mllm.centre(head, group.total(raw.sum(0)) / group.total(torch.tensor(float(len(raw)), device=raw.device)))


def first_reads(phase: Phase, mllm: Mllm, steps: int) -> Tensors:
    """By name of the sequences, (R, d), the states h of this process's share of the first steps."""
    reads: dict[str, list[Tensor]] = {}
    for made in loaded_ahead(phase.__getitem__, range(min(steps, len(phase))), phase.config.distill.workers):
        chunks, facts = send_to_device(made, phase.group.accelerator.device, non_blocking=True)
        found: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for chunk in chunks:
                for name, states in mllm.hidden(chunk).items():
                    found.setdefault(name, []).append(pooled(states, chunk[name]))
        for name, parts in found.items():
            read = torch.cat(parts)
            if name == "items" and "candidates" in facts:  # without the repeated ones that only fill up the processes' shares
                read = read[: max(0, len(facts["candidates"]) - phase.group.rank * len(read))]
            reads.setdefault(name, []).append(read)
    return {name: torch.cat(of) for name, of in reads.items()}


def whitening(covariance: Tensor, dim: int) -> Tensor:
    """(n <= dim, d) the main directions of a covariance (d, d) of layer-normed states, each scaled to variance one; none without any."""
    variances, directions = torch.linalg.eigh(covariance.cpu())
    main = (variances > SMALLEST * len(variances)).nonzero().flatten()[-dim:].flip(0)
    scaled: Tensor = directions[:, main] / variances[main].sqrt()
    return scaled.T.to(covariance.device, torch.float32)
