"""How the models of each family take an image: the token ids that stand for it, and the tensors of their vision tower.

`FAMILIES` is by `model_type` of the backbone's config. Images and texts are encoded by image processor and tokenizer alone
(a processor with a video part does not load without torchvision), so the tokens of an image are laid out here as the
family's own processor lays them out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # width, height


class Processor(NamedTuple):
    """What a backbone encodes images with, without its weights."""

    config: Any  # the model's
    tokenizer: Any
    image_processor: Any
    max_pixels: int | None  # images are scaled down to so many; None: the image processor's default


class Family(NamedTuple):
    encode: Callable[[Processor, Image.Image], tuple[list[int], dict[str, Tensor]]]  # an image's token ids and tensors
    tokens: Callable[[Processor, Size], int]  # how many ids an image of that size has, known without decoding it
    stack: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]  # the tensors of n images as the vision tower takes them
    typed: bool = False  # mm_token_type_ids are mandatory


def _idefics3_image(processor: Processor, image: Image.Image) -> tuple[list[int], dict[str, Tensor]]:
    pixels = processor.image_processor(images=[[image]], do_image_splitting=False, return_tensors="pt")["pixel_values"][0]
    count = _idefics3_tokens(processor) - 3
    fake, whole = processor.tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<global-img>"])
    return [fake, whole, *[processor.config.image_token_id] * count, fake], {"pixel_values": pixels}


def _idefics3_tokens(processor: Processor, size: Size = (0, 0)) -> int:
    config = processor.config
    return int((config.vision_config.image_size // config.vision_config.patch_size) ** 2 // config.scale_factor**2) + 3


def _stack(images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([i["pixel_values"] for i in images])}  # Idefics3: (n, 1, 3, H, W)


def _qwen_size(processor: Processor) -> dict[str, int]:
    """In pixels, of which "shortest_edge" is the least and "longest_edge" the most."""
    size = dict(processor.image_processor.size)
    if most := processor.max_pixels:
        size |= {"shortest_edge": min(most, size["shortest_edge"]), "longest_edge": most}
    return size


def _qwen_tokens(processor: Processor, size: Size) -> int:
    width, height = size
    within = _qwen_size(processor)
    limits = {"min_pixels": within["shortest_edge"], "max_pixels": within["longest_edge"]}
    try:
        patches = processor.image_processor.get_number_of_image_patches(height, width, limits)
    except (ValueError, ZeroDivisionError):  # a picture of no or of absurd proportions, which does not come this far
        return 2
    return int(patches // processor.image_processor.merge_size**2) + 2


def _qwen_image(processor: Processor, image: Image.Image) -> tuple[list[int], dict[str, Tensor]]:
    out = processor.image_processor(images=[image], return_tensors="pt", size=_qwen_size(processor))
    count = int(out["image_grid_thw"].prod()) // processor.image_processor.merge_size**2
    config = processor.config
    ids = [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
    return ids, {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}


def _qwen_stack(images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([i[name] for i in images]) for name in ("pixel_values", "image_grid_thw")}  # (patches, .), (n, 3)


_IDEFICS3 = Family(_idefics3_image, _idefics3_tokens, _stack)
_QWEN = Family(_qwen_image, _qwen_tokens, _qwen_stack, typed=True)
FAMILIES = {"idefics3": _IDEFICS3, "smolvlm": _IDEFICS3, "qwen2_vl": _QWEN, "qwen2_5_vl": _QWEN, "qwen3_vl": _QWEN}
