"""What an export saves, and what it costs, that runs only the first layers of the decoder (`export.layers`).

    python benchmarks/layers.py artifacts/shop

For every number of layers: the importance of its last layer, the cosine of the vectors with those of all layers, and the items a second
that the model embeds on one thread. All on the same decoded sample; medians over rounds in which the numbers of layers take turns.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.core.artifact import open_verified
from pipeline.core.config import BackboneConfig, DataConfig, ExportConfig
from pipeline.data.catalog import load_catalog
from pipeline.data.embeddings import HALVES
from pipeline.mllm.early_exit import measure, sample
from pipeline.mllm.model import embed
from pipeline.mllm.processor import PromptProcessor
from pipeline.mllm.prompt_templates import Templates
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.saved_mllm import load_mllm


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
