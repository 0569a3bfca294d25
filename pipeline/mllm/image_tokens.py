"""Turns an image into token ids and the inputs of the vision tower, for each family of models.

`FAMILIES` is keyed by the `model_type` of the backbone's config. Image processor and tokenizer are used on their own (a processor
with a video part does not load without torchvision), so the tokens of an image are laid out here as in the family's processor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

Size = tuple[int, int]  # width, height


class BackboneProcessor(NamedTuple):
    """What encodes a backbone's images: its config, tokenizer and image processor, without its weights."""

    config: Any  # of the model
    tokenizer: Any
    image_processor: Any
    max_pixels: int | None  # larger images are scaled down to this; None: the image processor's default


class Family(NamedTuple):
    """How the models of one family take images."""

    encode: Callable[[BackboneProcessor, Image.Image], tuple[list[int], dict[str, Tensor]]]  # an image -> token ids and tensors
    tokens: Callable[[BackboneProcessor, Size], int]  # number of ids of an image of that size, without decoding it
    stack: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]  # tensors of n images -> input of the vision tower
    # Computed ahead from the grids of the images, because the model would compute them one by one while its device waits: positions in
    # a batch (3, B, L), and further inputs of the vision tower
    positions: Callable[[Any, dict[str, Tensor], Tensor], Tensor] | None = None
    beside: Callable[[Any, Tensor], dict[str, Tensor]] | None = None
    types: str | None = None  # name of the model's argument that marks image tokens (1), where it is required
    sized: bool = False  # the number of tokens depends on the image's size, so `max_pixels` bounds it


def _fixed(
    ids: Callable[[BackboneProcessor], list[int]],
    pixels: Callable[[BackboneProcessor, Image.Image], Tensor] = lambda processor, image: processor.image_processor(image)["pixel_values"][
        0
    ],
    more: Callable[[Tensor], dict[str, Tensor]] = lambda pixels: {},
    types: str | None = None,
) -> Family:
    """Returns a family that scales every image to one size, so that all have the same token ids.

    `more` returns the further inputs of the vision tower.
    """

    def stack(images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        stacked = torch.stack([image["pixel_values"] for image in images])
        return {"pixel_values": stacked} | more(stacked)

    return Family(
        lambda processor, image: (ids(processor), {"pixel_values": torch.as_tensor(pixels(processor, image))}),
        lambda processor, size: len(ids(processor)),
        stack,
        types=types,
    )


def _squared(side: int, patch: int) -> int:
    return (side // patch) ** 2


def _idefics3_ids(processor: BackboneProcessor) -> list[int]:
    """Returns the ids of one image that is not split into tiles."""
    config = processor.config
    count = _squared(config.vision_config.image_size, config.vision_config.patch_size) // config.scale_factor**2
    fake, image_start = processor.tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<global-img>"])
    return [fake, image_start, *[config.image_token_id] * count, fake]


def _idefics3_pixels(processor: BackboneProcessor, image: Image.Image) -> Tensor:
    pixels: Tensor = processor.image_processor(images=[[image]], do_image_splitting=False, return_tensors="pt")["pixel_values"][0]
    return pixels  # (1, 3, H, W)


def _gemma3_ids(processor: BackboneProcessor) -> list[int]:
    """Returns the ids of an image without crops (pan and scan), as is the default of the model's processor."""
    config = processor.config
    lines = processor.tokenizer("\n\n", add_special_tokens=False).input_ids
    return [*lines, config.boi_token_index, *[config.image_token_id] * config.mm_tokens_per_image, config.eoi_token_index, *lines]


def _llava_ids(processor: BackboneProcessor) -> list[int]:
    """Returns one token a patch; the strategy "default" drops the tower's first output, which in CLIP is the class token."""
    config, vision = processor.config, processor.config.vision_config
    extra = (vision.model_type == "clip_vision_model") - (config.vision_feature_select_strategy == "default")
    return [config.image_token_id] * (_squared(vision.image_size, vision.patch_size) + extra)


def _onevision_ids(processor: BackboneProcessor) -> list[int]:
    return [*_llava_ids(processor), processor.config.image_token_id]  # the last one is the end of the row


def _onevision_pixels(processor: BackboneProcessor, image: Image.Image) -> Tensor:
    """Returns the image as one tile, padded to a square, as in the model's training on prompts with several images.

    A single image may have up to nine more tiles, at ten times the tokens; these are not used.
    """
    beside = Image.new("RGB", (1, 1))  # with a second image the image processor makes one tile of each
    pixels: Tensor = processor.image_processor(images=[[image, beside]], return_tensors="pt")["pixel_values"][0]
    return pixels[:1]  # (1, 3, H, W)


def _onevision_more(pixels: Tensor) -> dict[str, Tensor]:
    size = torch.tensor(pixels.shape[-2:])
    return {
        "image_sizes": size.expand(len(pixels), 2),
        "batch_num_images": torch.tensor([max(2, len(pixels))]),  # any number but one means: one tile each
    }


def image_bounds(processor: BackboneProcessor) -> dict[str, int]:
    """Returns the least ("shortest_edge") and the largest ("longest_edge") number of pixels of an image, in the families of Qwen."""
    size = dict(processor.image_processor.size)
    if limit := processor.max_pixels:
        size |= {"shortest_edge": min(limit, size["shortest_edge"]), "longest_edge": limit}
    return size


def _qwen_tokens(processor: BackboneProcessor, size: Size) -> int:
    width, height = size
    bounds = image_bounds(processor)
    limits = {"min_pixels": bounds["shortest_edge"], "max_pixels": bounds["longest_edge"]}
    try:
        patches = processor.image_processor.get_number_of_image_patches(height, width, limits)
    except (ValueError, ZeroDivisionError):  # an empty image or one of extreme proportions, which is refused when it is decoded
        return 2
    return int(patches // processor.image_processor.merge_size**2) + 2


def _qwen_image(processor: BackboneProcessor, image: Image.Image) -> tuple[list[int], dict[str, Tensor]]:
    out = processor.image_processor(images=[image], return_tensors="pt", size=image_bounds(processor))
    count = int(out["image_grid_thw"].prod()) // processor.image_processor.merge_size**2
    config = processor.config
    ids = [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id]
    return ids, {"pixel_values": out["pixel_values"], "image_grid_thw": out["image_grid_thw"]}


def _qwen_stack(images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([i[name] for i in images]) for name in ("pixel_values", "image_grid_thw")}  # (patches, .), (n, 3)


def _qwen_positions(model: Any, batch: dict[str, Tensor], grids: Tensor) -> Tensor:
    positions: Tensor = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=grids, attention_mask=batch["attention_mask"]
    )[0]
    return positions


def _qwen_beside(model: Any, grids: Tensor) -> dict[str, Tensor]:
    tower = model.model.visual
    merge = tower.spatial_merge_size
    inputs = {"position_ids": get_vision_position_ids(grids, merge), "cu_seqlens": get_vision_cu_seqlens(grids)}
    if hasattr(tower, "window_size"):  # Qwen2.5
        names = ("window_index", "cu_window_seqlens")
        inputs |= zip(names, get_vision_window_index(grids, merge, tower.window_size, tower.patch_size), strict=True)
    if hasattr(tower, "num_grid_per_side"):  # Qwen3
        way = (tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners, merge)
        inputs |= zip(("interp_indices", "interp_weights"), get_vision_interpolation_indices_and_weights(grids, *way), strict=True)
    return {f"image_{name}": tensor for name, tensor in inputs.items()}


_IDEFICS3 = _fixed(_idefics3_ids, _idefics3_pixels)
_QWEN = Family(_qwen_image, _qwen_tokens, _qwen_stack, _qwen_positions, _qwen_beside, "mm_token_type_ids", sized=True)
FAMILIES = {
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "gemma3": _fixed(_gemma3_ids, types="token_type_ids"),
    "llava": _fixed(_llava_ids),
    "llava_onevision": _fixed(_onevision_ids, _onevision_pixels, _onevision_more),
}
