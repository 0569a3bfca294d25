"""Initialises the new heads of a phase: centred, whitened for a pretrained backbone, and, for transitions, in closed form."""

import math

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast, send_to_device
from torch import Tensor

from pipeline.core.prefetch import loaded_ahead
from pipeline.distill.feature_table import item_features
from pipeline.distill.phases import Phase, Tensors
from pipeline.mllm.item_vectors import VECTORS
from pipeline.mllm.model import STATE, Mllm, pooled

READS = 8  # hidden states per dimension that whitening is measured on
SMALLEST = 1e-9  # smallest share of a direction in the variance of the states; below, it is rounding


def start_heads(phase: Phase, mllm: Mllm) -> None:
    """Starts the new heads: those of transitions in closed form, on the states of `head_rows`, the others by `start_by_variance`."""
    mllm.eval()  # no dropout; the training loop switches it on
    start_by_variance(phase, mllm)
    if len(rows := phase.head_rows()):
        states = item_features(mllm, phase, rows, (STATE,), phase.config.distill.workers)[STATE]
        for head, affine in phase.head_maps(rows, F.layer_norm(states, states.shape[-1:])).items():
            mllm.set_head(head, affine.to(states.device))
    if phase.group.world > 1:  # the decompositions of two machines may differ in signs
        for weight in mllm.heads.parameters():
            weight.data.copy_(broadcast(weight.data))


def start_by_variance(phase: Phase, mllm: Mllm) -> None:
    """Centres and whitens the new heads, measured on the sequences of the first steps, so that features differ from item to item.

    All new heads are centred, because hidden states share one large direction. In pretrained backbones a second dominant direction encodes
    which modality is withheld; without whitening, the contrastive loss collapses all features along it. So their heads start whitened,
    along the main directions of the states (BERT-whitening, arXiv 2103.15316). Copies of K's trained head are not whitened, nor are the
    heads of the tiny model, whose random states carry no such direction.
    """
    group, whiten = phase.group, phase.config.backbone.name != "tiny" and not phase.from_knowledge
    reads = first_reads(phase, mllm, math.ceil(READS * phase.config.distill.dim / phase.settings.batch) if whiten else 1)
    with torch.no_grad():
        if whiten:
            normed = F.layer_norm(reads["items"], reads["items"].shape[-1:]).double()
            count = group.total(torch.tensor(float(len(normed)), device=normed.device))
            mean = group.total(normed.sum(0)) / count
            directions = whitening(group.total(normed.T @ normed) / count - mean.outer(mean), phase.config.distill.dim)
            if phase.config.backbone.name == VECTORS:  # what an encoder was trained to tell apart keeps its share
                directions = F.normalize(directions, dim=1)
        for name, read in reads.items():
            for head in set(phase.heads[name]) & set(phase.new):
                if whiten:
                    mllm.turn(head, directions)
                raw = mllm.heads[head](read)
                mllm.centre(head, group.total(raw.sum(0)) / group.total(torch.tensor(float(len(raw)), device=raw.device)))


def first_reads(phase: Phase, mllm: Mllm, steps: int) -> Tensors:
    """Computes the pooled hidden states (R, d) of this process's share of the first steps, by name of the sequences."""
    reads: dict[str, list[Tensor]] = {}
    for batch in loaded_ahead(phase.__getitem__, range(steps), phase.config.distill.workers):
        chunks, facts = send_to_device(batch, phase.group.accelerator.device, non_blocking=True)
        states_of: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for chunk in chunks:
                for name, states in mllm.hidden(chunk).items():
                    states_of.setdefault(name, []).append(pooled(states, chunk[name]))
        for name, parts in states_of.items():
            read = torch.cat(parts)
            if name == "items" and "block" in facts:  # without the repeated items that pad the shares of the processes
                read = read[: max(0, len(facts["block"]) - phase.group.rank * len(read))]
            reads.setdefault(name, []).append(read)
    return {name: torch.cat(parts) for name, parts in reads.items()}


def whitening(covariance: Tensor, dim: int) -> Tensor:
    """Returns the main directions (n <= dim, d) of a covariance (d, d) of layer-normed states, each scaled to variance one."""
    variances, directions = torch.linalg.eigh(covariance.cpu())
    main = (variances > SMALLEST * len(variances)).nonzero().flatten()[-dim:].flip(0)
    scaled: Tensor = directions[:, main] / variances[main].sqrt()
    return scaled.T.to(covariance.device, torch.float32)
