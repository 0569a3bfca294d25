"""A step's batch in chunks: contrastive losses over more sequences than fit the device at a time.

GradCache (Gao et al., arXiv 2101.06983): all chunks are embedded without a graph, the losses are taken on the features of
all, and then each chunk is embedded again, with a graph, to send the gradients of its features on into the weights. The
gradient is that of the whole batch for the memory of one chunk, at the price of a second forward pass. Dropout draws the same
both times. A vision tower that does not train runs once a chunk; one that trains runs again with the rest.
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
    """The sequences of a step, at most `size` together; None: all."""
    flat = [(name, sequence) for name, of in sequences.items() for sequence in of]
    size = size or len(flat)
    chunks: list[dict[str, list[T]]] = []
    for first in range(0, len(flat), size):
        chunks.append({})
        for name, sequence in flat[first : first + size]:
            chunks[-1].setdefault(name, []).append(sequence)
    return chunks


def look_once(mllm: Mllm, chunks: Sequence[Chunk], accelerator: Accelerator) -> None:
    """Sends the pictures of all chunks through a vision tower that does not train."""
    for chunk in chunks:
        with torch.no_grad(), accelerator.autocast():
            if (seen := run_vision_tower(mllm.backbone.model, chunk)) is not None:
                chunk |= {"images": {}, "cached": seen.pack()}


def features(mllm: Mllm, chunks: Sequence[Chunk], heads: Any, seeds: Sequence[int]) -> Tensors:
    """What `Mllm` gives for the whole batch, as leaves that take gradients: sums add up, features stand one below the other."""
    found: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for chunk, seed in zip(chunks, seeds, strict=True):
            torch.manual_seed(seed)  # type: ignore[no-untyped-call]
            for name, part in mllm(chunk, heads).items():
                found.setdefault(name, []).append(part)
    return {name: (torch.cat(of) if of[0].ndim else torch.stack(of).sum()).requires_grad_() for name, of in found.items()}


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
    """Into the weights: the gradient of `loss`, which was taken on the `leaves` that `features` made; of `model` in its wrapper.

    `tie` joins the graph of the last chunk, the one after which processes add up their gradients.
    """
    slopes = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    taken = dict.fromkeys(leaves, 0)
    for number, (chunk, seed) in enumerate(zip(chunks, seeds, strict=True)):
        last = number + 1 == len(chunks)
        with nullcontext() if last else accelerator.no_sync(model):
            torch.manual_seed(seed)  # type: ignore[no-untyped-call]
            along = tie if last else torch.zeros_like(tie)
            for name, part in model(chunk, heads).items():
                if (slope := slopes[name]) is not None:
                    first = taken[name]
                    along = along + (part * (slope[first : first + len(part)] if part.ndim else slope)).sum()
                    taken[name] += len(part) if part.ndim else 0
            accelerator.backward(along)
