"""Runs only the first layers of the decoder in an export (`export.layers`), and measures the loss in quality.

`tpad distill` does not measure; `benchmarks/layers.py` does, on a fixed sample of items. Per layer it reports two quantities: the
importance of TAMP (arXiv 2504.09897), which is 1 - cosine of the layer's output tokens, averaged over pairs of vision tokens, of text
tokens and of a vision with a text token; and, more to the point, the cosine of the item vectors read after this layer with those
read after the last one.
"""

import math
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
    """Draws the rows to measure on."""
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:SAMPLE])


def measure(
    mllm: Mllm, processor: PromptProcessor, sequences: Sequence[Encoded], token_budget: int, device: torch.device
) -> list[dict[str, float]]:
    """Measures every layer: its `importance`, and per half the mean cosine of the vectors read after it with the final ones."""
    decoder = mllm.backbone.model.get_decoder()
    heads = [half for half in HALVES if half in mllm.heads]
    measures: list[Tensor] = []  # per batch (B, layers, 1 + heads)
    image = processor.backbone_processor.config.image_token_id
    with torch.inference_mode():
        for positions in cut(np.array([len(sequence) for sequence in sequences]), token_budget):
            batches = processor.collate({"items": [sequences[n] for n in positions]})
            tensors = send_to_device(batches, device)
            with outputs(decoder) as layers:
                mllm.hidden(tensors)
            batch = tensors["items"]
            is_image = batch["input_ids"] == image
            vision, text = is_image, ~is_image & batch["attention_mask"].bool()
            states = [pooled(decoder.norm(output).flatten(0, 1), batch) for output in layers]
            vectors = [[F.normalize(mllm.heads[head](state), dim=-1) for head in heads] for state in states]
            cosines = [[(early * full).sum(-1) for early, full in zip(v, vectors[-1], strict=True)] for v in vectors]
            columns = [torch.stack([apart(s, vision, text), *cosine], -1) for s, cosine in zip(layers, cosines, strict=True)]
            measures.append(torch.stack(columns, 1).double().cpu())
    means = torch.cat(measures).mean(0).tolist()
    return [{name: round(value, 4) for name, value in zip(("importance", *heads), layer, strict=True)} for layer in means]


@contextmanager
def outputs(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the output of each layer, (B, L, d), of one pass through the decoder, DeepStack's features included."""
    states: list[Tensor] = []
    after = [*decoder.layers[1:], decoder.norm]  # type: ignore[index]
    hooks = [module.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for module in after]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def apart(states: Tensor, vision: Tensor, text: Tensor) -> Tensor:
    """Averages the distances between the tokens of each sequence, over those of the three kinds of pairs that it has: (B,)."""
    unit = F.normalize(states.float(), dim=-1)
    kinds = [((unit * mask[..., None]).sum(1), mask.sum(1)) for mask in (vision, text)]  # a sum of unit vectors has all their cosines
    within = [1 - (total.square().sum(-1) - n) / (n * (n - 1)) for total, n in kinds]
    (vision_sum, n), (text_sum, m) = kinds
    distances = torch.stack([*within, 1 - (vision_sum * text_sum).sum(-1) / (n * m)])
    return distances.masked_fill(~distances.isfinite(), math.nan).nanmean(0)  # no pairs of a kind: not finite


def stop_after(mllm: nn.Module, count: int) -> None:
    """Removes the layers above the first `count`. DeepStack still adds its features to the layers that stay."""
    for module in mllm.modules():
        if isinstance(module, Mllm):
            decoder = module.backbone.model.get_decoder()
            decoder.layers = decoder.layers[:count]
