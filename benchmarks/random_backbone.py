"""A backbone in the shape of a published one, with random weights: what it costs to run, where no hub is reachable.

    python benchmarks/random_backbone.py configs/qwen3-vl-2b.yaml artifacts/random-qwen3-vl-2b

A local folder as any other: weights in bf16, drawn on the GPU where there is one, the image processor of the family, and a
byte-level tokenizer of 768 entries, so that a text has more tokens than under the published one. Shapes: benchmarks/memory.py.
"""

import argparse
from pathlib import Path

import torch
from memory import SHAPES
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2VLImageProcessorPil, SmolVLMImageProcessorPil

from pipeline.core.config_file import load_config
from pipeline.mllm.tiny_backbone import train_tokenizer

WORDS = ["the quick brown fox jumps over the lazy dog", "a small blue mug of clay with a star", "wide grey scarf, wool, soft and warm"]


def write(name: str, folder: Path, layers: int | None = None) -> None:
    """`layers`: only so many in the language model, to try the writing itself."""
    tokenizer = train_tokenizer(768, WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>"]})
    image, start, end = tokenizer.convert_tokens_to_ids(["<image>", "<|vision_start|>", "<|vision_end|>"])
    shape = SHAPES[name] | {"image_token_id": image, "pad_token_id": tokenizer.pad_token_id}
    if shape["model_type"] == "qwen3_vl":
        shape |= {"vision_start_token_id": start, "vision_end_token_id": end}
        processor = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=65_536, max_pixels=16_777_216)
    else:
        side = {"longest_edge": shape["vision_config"]["image_size"]}
        processor = SmolVLMImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    config = AutoConfig.for_model(**shape)
    if layers is not None:
        config.get_text_config().num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a file of configs/ with a Qwen3-VL or SmolVLM backbone")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    write(load_config(given.config).backbone.name, given.folder, given.layers)
