"""Backbones as a user would have them: a local folder, here with random weights."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    LlavaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    SmolVLMConfig,
)

FAMILIES = ("idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "llava_onevision")
SIDE = 24  # pixels a side of an image, where all have the same


def save_backbone(folder: Path, family: str) -> Path:
    """A random model of under a million parameters, with its tokenizer and image processor."""
    special = ["<|pad|>", "<|end|>", "<image>", "<fake_token_around_image>", "<global-img>", "<|vision_start|>", "<|vision_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([" Item: a mug."], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[1], extra_special_tokens=special[2:])
    if family == "qwen3_vl":
        tokenizer.chat_template = (
            "{% for m in messages %}<|end|>{{ m.role }}\n{% for c in m.content %}{{ c.text }}{% endfor %}<|end|>{% endfor %}assistant\n"
        )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(_config(family, tokenizer))
    if family == "gemma3":  # begins as zeros, which no trained model has: it would see nothing
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    for part in (model, tokenizer, _image_processor(family)):
        part.save_pretrained(folder)
    return folder


def _image_processor(family: str) -> Any:
    square, longest = {"height": SIDE, "width": SIDE}, {"longest_edge": SIDE}
    if family == "gemma3":
        return Gemma3ImageProcessorPil(size=square)
    if family == "llava":
        return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
    if family == "llava_onevision":
        return LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]])
    if family.startswith("qwen"):
        return Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    return Idefics3ImageProcessorPil(size=longest, max_image_size=longest, do_image_splitting=False)


def _config(family: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    image, start, end = tokenizer.convert_tokens_to_ids(["<image>", "<|vision_start|>", "<|vision_end|>"])
    text: dict[str, Any] = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 1, "pad_token_id": tokenizer.pad_token_id},
    }
    if family.startswith("qwen"):
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2} | {
            "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            "qwen2_5_vl": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "qwen3_vl": {
                **{"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 64},
                "deepstack_visual_indexes": [0],
            },
        }[family]
        kind = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig, "qwen3_vl": Qwen3VLConfig}[family]
        text |= {"rope_parameters": rope} | ({"head_dim": 16} if family == "qwen3_vl" else {})
        return kind(text_config=text, vision_config=vision, image_token_id=image, vision_start_token_id=start, vision_end_token_id=end)
    vision = {
        **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": SIDE, "patch_size": 6},
    }
    if family == "gemma3":
        text |= {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
        marks = {"boi_token_index": start, "eoi_token_index": end, "image_token_index": image}
        return Gemma3Config(text_config=text, vision_config=vision | {"vision_use_head": False}, mm_tokens_per_image=4, **marks)
    if family == "llava":
        vision |= {"model_type": "clip_vision_model"}
        return LlavaConfig(text_config=text | {"model_type": "llama"}, vision_config=vision, image_token_index=image)
    if family == "llava_onevision":
        return LlavaOnevisionConfig(
            text_config=text | {"model_type": "qwen2"},
            vision_config=vision | {"model_type": "siglip_vision_model", "vision_use_head": False},
            image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
            image_token_index=image,
        )
    kind = {"idefics3": Idefics3Config, "smolvlm": SmolVLMConfig}[family]
    return kind(text_config=text | {"model_type": "llama"}, vision_config=vision, image_token_id=image, scale_factor=2, pad_token_id=0)
