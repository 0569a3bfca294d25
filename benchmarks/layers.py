"""What an export saves, and what it costs, that runs only the first layers of the decoder (`export.layers`).

    python benchmarks/layers.py artifacts/shop

For every number of layers: the importance of its last layer, the cosine of the vectors with those of all layers, and the items a second
that the model embeds on one thread. All on the same decoded sample; medians over rounds in which the numbers of layers take turns.

The importance is that of TAMP (arXiv 2504.09897): 1 - cosine of the layer's output tokens, averaged over pairs of vision tokens, of text
tokens, and of a vision with a text token.
"""

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor, nn

from pipeline.core.artifact import open_verified
from pipeline.core.config import BackboneConfig, DataConfig, ExportConfig
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import HALVES
from pipeline.mllm.model import Mllm, embed, pooled
from pipeline.mllm.processor import Encoded, PromptProcessor
from pipeline.mllm.prompt_templates import Templates
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.saved_mllm import load_mllm
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run that `tpad distill` has ended")
    parser.add_argument("--data", type=Path, help="default: the sample shop's, in the run")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    mllm, backbone, settings = load_mllm(open_verified(args.run / "mllm", "mllm", "run `tpad distill` first").path, merge=True)
    catalog = load_catalog(args.data or args.run / "data")
    prompts = Prompts(catalog, DataConfig.model_validate(settings["data"]), Templates.model_validate(settings["templates"]))
    encoder = PromptProcessor(BackboneConfig.model_validate(settings["backbone"]), backbone, catalog)
    sequences = [encoder.encode(prompts.item(int(row))) for row in sample(len(catalog), 0)]
    budget = ExportConfig().token_budget
    table = measure(mllm.eval(), encoder, sequences, budget, torch.device("cpu"))
    decoder = backbone.model.get_decoder()
    whole, seconds = decoder.layers, np.zeros((args.rounds + 1, len(table)))
    for n in range(len(seconds)):
        for count in range(len(table), 0, -1):
            decoder.layers = whole[:count]
            began = time.perf_counter()
            embed(mllm, encoder, sequences, HALVES, budget, "cpu")
            seconds[n, count - 1] = time.perf_counter() - began
    took = np.median(seconds[1:], axis=0)  # the first round warms up
    print("| layers | importance of the last | cosine k | cosine p | items/s | ratio |\n| --- | --- | --- | --- | --- | --- |")
    for count in range(len(table), 0, -1):
        layer = table[count - 1]
        speed = f"{len(sequences) / took[count - 1]:.0f} | {took[-1] / took[count - 1]:.2f}"
        print(f"| {count} | {layer['importance']:.4f} | {layer['knowledge']:.4f} | {layer['transition']:.4f} | {speed} |")


if __name__ == "__main__":
    main()
