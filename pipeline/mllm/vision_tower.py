"""Runs the vision tower: images in, vision features out.

The features are computed here, or were read from the files of `vision_cache.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

PACKED = "tpad_flash"  # transformers passes the bounds of the images to attention functions with "flash" in their names


class ImageInput(NamedTuple):
    """An image as the backbone takes it: its tokens, and the inputs of the vision tower or its cached output."""

    key: bytes  # sha256 of the file's bytes: equal images, of one item or of several, have equal keys
    ids: list[int]  # token ids in the sequence
    tensors: dict[str, Tensor]  # inputs of the vision tower; empty for a cached image
    cached: dict[str, Tensor] | None = None  # vision features, in the form of `VisionFeatures.pack`

    @property
    def grid(self) -> Tensor:
        """(1, 3) patches in time, height and width; of families that have it."""
        return self.tensors["image_grid_thw"] if self.cached is None else self.cached["grid"]


class VisionFeatures(NamedTuple):
    """The output of a vision tower for n images; the names are those that the language models of transformers expect."""

    pooler_output: Any  # an entry an image: a list of (tokens, d), or one tensor (n, tokens, d)
    deepstack_features: list[Any]  # the same for each level of DeepStack, in models that have it
    grid: Tensor | None  # (n, 3), in families whose language model needs it

    def select(self, numbers: Tensor) -> "VisionFeatures":
        """Returns the features of the images `numbers` (I,), in that order."""

        def entries(features: Any) -> Any:
            return features[numbers] if isinstance(features, Tensor) else [features[n] for n in numbers.tolist()]

        levels = [entries(level) for level in self.deepstack_features]
        return VisionFeatures(entries(self.pooler_output), levels, None if self.grid is None else self.grid[numbers])

    def pack(self) -> dict[str, Tensor]:
        """Returns flat tensors that `join` can concatenate: (S, d) for the S tokens of n images, or (n, tokens, d) if all have as many."""
        packed = {"pooled": _flat(self.pooler_output), "counts": torch.tensor([len(tokens) for tokens in self.pooler_output])}
        packed |= {f"level.{n}": _flat(level) for n, level in enumerate(self.deepstack_features)}
        return packed if self.grid is None else packed | {"grid": self.grid}

    @staticmethod
    def unpack(packed: dict[str, Tensor]) -> "VisionFeatures":
        """Restores the features from the tensors of `pack`."""
        counts = packed["counts"].tolist()
        names = ["pooled", *(f"level.{n}" for n in range(sum(name.startswith("level.") for name in packed)))]
        pooled, *levels = (_split(packed[name], counts) for name in names)
        return VisionFeatures(pooled, levels, packed.get("grid"))


def _flat(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(list(features))


def _split(flat: Tensor, counts: list[int]) -> Any:
    return flat if flat.ndim == 3 else list(torch.split(flat, counts))


def join(packed: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenates the tensors of several `VisionFeatures.pack`."""
    return {name: torch.cat([tensors[name] for tensors in packed]) for name in packed[0]}


def run_vision_tower(model: Any, batches: dict[str, dict[str, Tensor]]) -> VisionFeatures | None:
    """Returns the features of the distinct images of `PromptProcessor.collate`; None where there are none.

    The images of "images" go through the tower; the features of "cached" were computed earlier.
    """
    features = []
    if images := batches.get("images"):
        out = model.get_image_features(**images, return_dict=True)
        features.append(VisionFeatures(out.pooler_output, list(getattr(out, "deepstack_features", [])), images.get("image_grid_thw")))
    if cached := batches.get("cached"):
        features.append(VisionFeatures.unpack(cached))
    return None if not features else features[0] if len(features) == 1 else VisionFeatures.unpack(join([f.pack() for f in features]))


def attend_within(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attends within each image of a packed sequence, (1, H, T, d) -> (1, T, H, d), by the FlashAttention of PyTorch."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling)
    assert isinstance(out, Tensor)
    return out[None], None


AttentionInterface.register(PACKED, attend_within)


def pack_attention(model: Any, device: torch.device) -> None:
    """Lets the towers of Qwen, whose images differ in size, attend within all images in one call; on a GPU with half precision only.

    Otherwise they loop over the images and wait for the device each time.
    """
    if device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16) and hasattr(model.model, "visual"):
        model.model.visual.config._attn_implementation = PACKED


def tower(model: Any) -> dict[str, Tensor]:
    """Returns the named weights of the vision tower and its connector: all that are not of the language model."""
    decoder = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in decoder}


def is_frozen(model: Any) -> bool:
    """Returns whether no weight of the vision tower trains."""
    return not any(weight.requires_grad for weight in tower(model).values())
