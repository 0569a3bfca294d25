"""Computes contrastive losses over a batch that does not fit the device, in chunks (GradCache, Gao et al., arXiv 2101.06983).

1. Every chunk is embedded without a graph.
2. The loss of the whole batch, and its gradient with respect to the features, are computed from these features.
3. Every chunk is embedded again, with a graph, and the gradients of its features go on into the weights.

The result is the gradient of the whole batch, in the memory of one chunk, for a second forward pass. Dropout draws the same values in both
passes. A frozen vision tower runs once per chunk; a trained one runs in both passes.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.mllm.model import Mllm
from pipeline.mllm.vision_tower import run_vision_tower

T = TypeVar("T")
Tensors = dict[str, Tensor]
Chunk = dict[str, Tensors]  # as `PromptProcessor.collate` makes it


def split(sequences: Mapping[str, Sequence[T]], size: int | None) -> list[dict[str, list[T]]]:
    """Splits the sequences of a step into chunks of at most `size`; None: one chunk."""
    flat = [(name, sequence) for name, group in sequences.items() for sequence in group]
    size = size or len(flat)
    chunks: list[dict[str, list[T]]] = []
    for first in range(0, len(flat), size):
        chunks.append({})
        for name, sequence in flat[first : first + size]:
            chunks[-1].setdefault(name, []).append(sequence)
    return chunks


def precompute_vision(mllm: Mllm, chunks: Sequence[Chunk], accelerator: Accelerator) -> None:
    """Replaces the images of each chunk by the output of the frozen vision tower."""
    for chunk in chunks:
        with torch.no_grad(), accelerator.autocast():
            if (vision := run_vision_tower(mllm.backbone.model, chunk)) is not None:
                chunk |= {"images": {}, "cached": vision.pack()}


def features(mllm: Mllm, chunks: Sequence[Chunk], heads: Any, seeds: Sequence[int]) -> Tensors:
    """Embeds all chunks without a graph. Returns the outputs of `Mllm` for the batch, as leaves: features concatenated, sums added."""
    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for chunk, seed in zip(chunks, seeds, strict=True):
            torch.manual_seed(seed)  # type: ignore[no-untyped-call]
            for name, part in mllm(chunk, heads).items():
                parts.setdefault(name, []).append(part)
    return {name: (torch.cat(p) if p[0].ndim else torch.stack(p).sum()).requires_grad_() for name, p in parts.items()}


def backward(
    model: Any,
    chunks: Sequence[Chunk],
    heads: Any,
    seeds: Sequence[int],
    loss: Tensor,
    leaves: Tensors,
    tie: Tensor,
    accelerator: Accelerator,
) -> None:
    """Sends the gradient of `loss`, computed from the `leaves` of `features`, into the weights of the wrapped `model`.

    `tie` joins the graph of the last chunk, after which the processes add up their gradients.
    """
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    offsets = dict.fromkeys(leaves, 0)  # rows of earlier chunks
    for number, (chunk, seed) in enumerate(zip(chunks, seeds, strict=True)):
        last = number + 1 == len(chunks)
        with nullcontext() if last else accelerator.no_sync(model):
            torch.manual_seed(seed)  # type: ignore[no-untyped-call]
            surrogate = tie if last else torch.zeros_like(tie)  # has the gradient of `loss` with respect to the chunk's features
            for name, part in model(chunk, heads).items():
                if (gradient := gradients[name]) is not None:
                    first = offsets[name]
                    surrogate = surrogate + (part * (gradient[first : first + len(part)] if part.ndim else gradient)).sum()
                    offsets[name] += len(part) if part.ndim else 0
            accelerator.backward(surrogate)
