"""Measures each decoder layer, so that an export can stop early (`export.layers`) at a known loss of quality.

The importance of a layer is the mean distance, 1 - cosine, between its output tokens: over pairs of vision tokens, of text tokens,
and of a vision with a text token, averaged over the three (TAMP, arXiv 2504.09897, which prunes by it; here the last layers are left
out). The loss of quality is the cosine of an item's vectors read after that layer with those read after the last one. Both are
measured on a fixed sample of items.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn

from pipeline.data.embeddings import HALVES
from pipeline.mllm.model import Mllm, pooled
from pipeline.mllm.processor import Encoded, PromptProcessor
from pipeline.mllm.token_batches import cut

SAMPLE = 256  # largest number of items measured on


def sample(count: int, seed: int) -> np.ndarray:
    """Returns the rows to measure on."""
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:SAMPLE])


def measure(
    mllm: Mllm, processor: PromptProcessor, sequences: Sequence[Encoded], token_budget: int, device: torch.device
) -> list[dict[str, float]]:
    """Returns by layer its `importance`, and for each half the mean cosine of the vectors after it with those after the last."""
    decoder = mllm.backbone.model.get_decoder()
    heads = [half for half in HALVES if half in mllm.heads]
    measured: list[Tensor] = []  # of each batch (B, layers, 1 + heads)
    image = processor.backbone_processor.config.image_token_id
    with torch.inference_mode():
        for positions in cut(np.array([len(s) for s in sequences]), token_budget):
            batches = processor.collate({"items": [sequences[n] for n in positions]})
            tensors = send_to_device(batches, device)
            with outputs(decoder) as layers:
                mllm.hidden(tensors)
            batch = tensors["items"]
            vision, text = ((batch["input_ids"] == image) == of_image for of_image in (True, False))
            text &= batch["attention_mask"].bool()
            read = [pooled(decoder.norm(states).flatten(0, 1), batch) for states in layers]
            vectors = [[F.normalize(mllm.heads[head](r), dim=-1) for head in heads] for r in read]
            cosines = [[(ours * theirs).sum(-1) for ours, theirs in zip(v, vectors[-1], strict=True)] for v in vectors]
            rows = [torch.stack([apart(s, vision, text), *cosine], -1) for s, cosine in zip(layers, cosines, strict=True)]
            measured.append(torch.stack(rows, 1).double().cpu())
    means = torch.cat(measured).mean(0).tolist()
    return [{name: round(value, 4) for name, value in zip(("importance", *heads), layer, strict=True)} for layer in means]


@contextmanager
def outputs(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the states (B, L, d) after each layer, DeepStack's features included, of a decoder pass in the body."""
    states: list[Tensor] = []
    after = [*decoder.layers[1:], decoder.norm]  # type: ignore[index]
    hooks = [module.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0])) for module in after]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def apart(states: Tensor, vision: Tensor, text: Tensor) -> Tensor:
    """Returns (B,) the mean distance between the tokens of each sequence, over the kinds of pairs that it has."""
    unit = F.normalize(states.float(), dim=-1)
    kinds = [((unit * mask[..., None]).sum(1), mask.sum(1)) for mask in (vision, text)]  # from sums of unit vectors follow their cosines
    within = [1 - (total.square().sum(-1) - n) / (n * (n - 1)) for total, n in kinds]
    (vision_sum, n), (text_sum, m) = kinds
    distances = torch.stack([*within, 1 - (vision_sum * text_sum).sum(-1) / (n * m)])
    return distances.masked_fill(~distances.isfinite(), math.nan).nanmean(0)  # NaN: fewer than two tokens, or none of one kind


def tell(layers: list[dict[str, float]]) -> None:
    """Prints the table of `measure` to stderr."""
    for n, layer in enumerate(layers, 1):
        cosines = ", ".join(f"{layer[half]:.4f} {half}" for half in HALVES if half in layer)
        print(f"layer {n} of {len(layers)}: importance {layer['importance']:.4f}; export.layers = {n}: cosine {cosines}", file=sys.stderr)


def stop_after(mllm: nn.Module, count: int) -> None:
    """Removes the decoder layers after the first `count`; DeepStack still adds its features to the remaining ones."""
    for module in mllm.modules():
        if isinstance(module, Mllm):
            decoder = module.backbone.model.get_decoder()
            decoder.layers = decoder.layers[:count]
