"""What a config with a published backbone needs of a GPU's memory in training: computed from shapes, measured nowhere.

    python benchmarks/memory.py configs/*.yaml

Parameters are counted on the model that transformers builds from its config, without weights (meta device), with this project's
adapters; the shapes below are those of the published configs. The rest is arithmetic on one process's share of the largest
step, in bytes, an upper estimate:

    weights      frozen parameters x 2 (bf16; in 4 bits: half a byte for the linear layers of the language model)
    adapters     trained parameters x 28: weight, gradient and two moments of AdamW in fp32, three copies kept between phases
    activations  with gradient checkpointing: tokens x hidden x layers x 2, what every layer is computed again from;
                 one layer at work, tokens x (16 hidden + 6 intermediate) x 2; logits, answer tokens x vocabulary x 10
    pictures     the vision tower, which keeps nothing for a gradient: one of its layers at work on all pictures of the step

Not in it: the CUDA context and kernels (about one GB), and what the allocator loses to fragments.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from pipeline.core.config import Config
from pipeline.core.config_file import load_config
from pipeline.mllm.backbone import Backbone, adapted

FRAME, ANSWER = 48, 16  # tokens of a prompt around its items, and of an answer: more than the prompts here have
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "patch_size": 14}
QWEN3_VL_2B = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "text_config": {
        **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "head_dim": 128},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
    },
    "vision_config": {
        **{"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2048},
        "deepstack_visual_indexes": [5, 11, 17],
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-VL-2B-Instruct": QWEN3_VL_2B,
    "Qwen/Qwen3-VL-Embedding-2B": QWEN3_VL_2B,
    "Qwen/Qwen3-VL-8B-Instruct": {
        "model_type": "qwen3_vl",
        "text_config": {
            **{"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128},
            **{"num_attention_heads": 32, "num_key_value_heads": 8},
        },
        "vision_config": {
            **{"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096},
            "deepstack_visual_indexes": [8, 16, 24],
        },
    },
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": {
        "model_type": "smolvlm",
        "scale_factor": 4,
        "text_config": {
            **{"model_type": "llama", "vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
            **{"num_attention_heads": 9, "num_key_value_heads": 3},
        },
        "vision_config": {
            **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
            **{"image_size": 512, "patch_size": 16},
        },
    },
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": {
        "model_type": "smolvlm",
        "scale_factor": 3,
        "text_config": {
            **{"model_type": "llama", "vocab_size": 49280, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24},
            **{"num_attention_heads": 32, "num_key_value_heads": 32},
        },
        "vision_config": SO400M | {"image_size": 384, "num_hidden_layers": 27},
    },
    "google/gemma-3-4b-it": {
        "model_type": "gemma3",
        "text_config": {
            **{"vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "head_dim": 256},
            **{"num_attention_heads": 8, "num_key_value_heads": 4},
        },
        "vision_config": SO400M | {"image_size": 896, "num_hidden_layers": 27, "vision_use_head": False},
    },
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": {
        "model_type": "llava_onevision",
        "text_config": {
            **{"model_type": "qwen2", "vocab_size": 152000, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
            **{"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
        },
        "vision_config": SO400M
        | {"model_type": "siglip_vision_model", "image_size": 384, "num_hidden_layers": 26, "vision_use_head": False},
        "tie_word_embeddings": True,
    },
}


def picture(shape: Any, max_pixels: int | None) -> tuple[int, int]:
    """(patches, tokens) of one picture."""
    vision, kind = shape.vision_config, shape.model_type
    if kind == "qwen3_vl":
        assert max_pixels is not None, "without it a picture may cost any number of tokens"
        patches = max_pixels // vision.patch_size**2
        return patches, patches // vision.spatial_merge_size**2 + 2
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens = {"smolvlm": patches // getattr(shape, "scale_factor", 1) ** 2 + 3, "gemma3": 260, "llava_onevision": patches + 1}
    return patches, tokens[kind]


def steps(config: Config) -> dict[str, tuple[int, int, int]]:
    """By phase: sequences of one item, items in sequences of several, and pictures, of the largest forward pass."""
    cfg = config.distill
    most = cfg.chunk or cfg.transfer.batch + cfg.transfer.sessions + 2 * cfg.knowledge.batch + cfg.align.batch
    block = min(cfg.transfer.batch, most)
    within = min(cfg.transfer.sessions, most - block) * cfg.transfer.items
    return {
        "knowledge": (min(2 * cfg.knowledge.batch, most), 0, min(cfg.knowledge.batch, most)),
        "transfer": (block, within, block + within),
        "align": (min(cfg.align.batch, most), 0, min(cfg.align.batch, most)),
    }


def memory(config: Config) -> dict[str, float]:
    """GB by what they are for, on a single process; "parameters" in billions."""
    shape = AutoConfig.for_model(**SHAPES[config.backbone.name])
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(shape, dtype=torch.bfloat16)
    total = sum(p.numel() for p in whole.parameters())
    four_bits = sum(m.weight.numel() for m in whole.get_decoder().modules() if isinstance(m, nn.Linear)) if config.backbone.quantize else 0
    model = adapted(Backbone(whole, None, None), config.backbone).model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) + 4 * config.distill.dim * shape.get_text_config().hidden_size
    text, vision = shape.get_text_config(), shape.vision_config
    patches, image_tokens = picture(shape, config.backbone.max_pixels)
    item = config.backbone.max_text_tokens + image_tokens
    largest = {}
    for phase, (alone, within, pictures) in steps(config).items():
        sequences = alone + within // config.distill.transfer.items
        tokens = (alone + within) * item + sequences * (FRAME + ANSWER)
        kept = tokens * text.hidden_size * text.num_hidden_layers * 2 + tokens * (16 * text.hidden_size + 6 * text.intermediate_size) * 2
        logits = sequences * ANSWER * text.vocab_size * 10
        seen = pictures * patches * (16 * vision.hidden_size + 6 * vision.intermediate_size) * 2
        largest[phase] = (kept + logits, seen)
    activations, seen = max(largest.values(), key=sum)
    found = {
        "weights": (total - four_bits) * 2 + four_bits * 0.5,
        "adapters": trained * 28,
        "activations": activations,
        "pictures": seen,
    }
    return {"parameters": total / 1e9} | {name: of / 1e9 for name, of in found.items()} | {"total": sum(found.values()) / 1e9}


def line(config: Config) -> str:
    """As it stands in the config's comment."""
    of = memory(config)
    parts = " + ".join(f"{of[name]:.1f} {name}" for name in ("weights", "adapters", "activations", "pictures"))
    return f"{of['parameters']:.2f} billion parameters; GB: {parts} = {of['total']:.0f}"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        settings = load_config(Path(path))
        if settings.backbone.name in SHAPES:
            print(f"{path}: {line(settings)}")
