"""What each layer of the decoder adds, so that an export can stop early (`export.layers`) and a user sees what that costs.

A layer's importance is how far apart its output tokens are, 1 - cosine on average over pairs of vision tokens, of text
tokens, and of one with the other, and over the three: TAMP (arXiv 2504.09897), which prunes by it; here layers are left out from
the last one down. What counts is beside it: the cosine of an item's vectors, read after that layer, with those read after
the last one. Both are of a fixed sample of items.
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

SAMPLE = 256  # items, at most


def sample(count: int, seed: int) -> np.ndarray:
    """Rows to measure on."""
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:SAMPLE])


def measure(
    mllm: Mllm, processor: PromptProcessor, sequences: Sequence[Encoded], token_budget: int, device: torch.device
) -> list[dict[str, float]]:
    """By layer: its `importance`, and for each half the mean cosine of the vectors read after it with those read after the last."""
    decoder = mllm.backbone.model.get_decoder()
    heads = [half for half in HALVES if half in mllm.heads]
    found: list[Tensor] = []  # of each batch (B, layers, 1 + heads)
    image = processor.backbone_processor.config.image_token_id
    with torch.inference_mode():
        for at in cut(np.array([len(s) for s in sequences]), token_budget):
            batches = processor.collate({"items": [sequences[n] for n in at]})
            tensors = send_to_device(batches, device)
            with outputs(decoder) as layers:
                mllm.hidden(tensors)
            batch = tensors["items"]
            vision, text = ((batch["input_ids"] == image) == seen for seen in (True, False))
            text &= batch["attention_mask"].bool()
            read = [pooled(decoder.norm(states).flatten(0, 1), batch) for states in layers]
            vectors = [[F.normalize(mllm.heads[head](r), dim=-1) for head in heads] for r in read]
            cosines = [[(ours * theirs).sum(-1) for ours, theirs in zip(v, vectors[-1], strict=True)] for v in vectors]
            rows = [torch.stack([apart(s, vision, text), *cosine], -1) for s, cosine in zip(layers, cosines, strict=True)]
            found.append(torch.stack(rows, 1).double().cpu())
    means = torch.cat(found).mean(0).tolist()
    return [{name: round(value, 4) for name, value in zip(("importance", *heads), layer, strict=True)} for layer in means]


@contextmanager
def outputs(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """What a pass through the decoder inside hands on after each layer, DeepStack's features included: (B, L, d) each."""
    found: list[Tensor] = []
    after = [*decoder.layers[1:], decoder.norm]  # type: ignore[index]
    hooks = [module.register_forward_pre_hook(lambda _, given: found.append(given[0])) for module in after]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def apart(states: Tensor, vision: Tensor, text: Tensor) -> Tensor:
    """(B,) mean distance of the tokens of each sequence, of those three kinds of pairs that it has."""
    unit = F.normalize(states.float(), dim=-1)
    kinds = [((unit * of[..., None]).sum(1), of.sum(1)) for of in (vision, text)]  # a sum of unit vectors has all their cosines
    within = [1 - (total.square().sum(-1) - n) / (n * (n - 1)) for total, n in kinds]
    (seen, n), (said, m) = kinds
    distances = torch.stack([*within, 1 - (seen * said).sum(-1) / (n * m)])
    return distances.masked_fill(~distances.isfinite(), math.nan).nanmean(0)  # a token has no distance to itself, nor to none


def tell(layers: list[dict[str, float]]) -> None:
    for n, layer in enumerate(layers, 1):
        cosines = ", ".join(f"{layer[half]:.4f} {half}" for half in HALVES if half in layer)
        print(f"layer {n} of {len(layers)}: importance {layer['importance']:.4f}; export.layers = {n}: cosine {cosines}", file=sys.stderr)


def stop_after(mllm: nn.Module, count: int) -> None:
    """Leaves out the layers above the first `count`; what DeepStack adds to those, it still does."""
    for each in mllm.modules():
        if isinstance(each, Mllm):
            decoder = each.backbone.model.get_decoder()
            decoder.layers = decoder.layers[:count]
