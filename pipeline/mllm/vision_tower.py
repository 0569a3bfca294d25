"""What the vision tower makes of a picture.

Computed here, or read from where `vision_cache.py` has kept it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

PACKED = "tpad_flash"  # transformers gives the bounds of the pictures to what has "flash" in its name


class Picture(NamedTuple):
    """An image as the backbone takes it."""

    key: bytes  # of the file's bytes: equal pictures, of one item or of several, have equal keys
    ids: list[int]  # the tokens that stand for it
    tensors: dict[str, Tensor]  # what the vision tower takes
    kept: dict[str, Tensor] | None = None  # what the tower made of it, in the form of `Seen.pack`

    @property
    def grid(self) -> Tensor:
        """(1, 3), of families that have one"""
        return self.tensors["image_grid_thw"] if self.kept is None else self.kept["grid"]


class Seen(NamedTuple):
    """What a vision tower makes of n pictures; the names are those under which the language models look for it."""

    pooler_output: Any  # an entry a picture: (tokens, d) in a list, or all in one (n, tokens, d)
    deepstack_features: list[Any]  # the same for each level, where there are levels
    grid: Tensor | None  # (n, 3), where the language model wants to know

    def of(self, pictures: Tensor) -> "Seen":
        """The entries of the images of a batch, by the numbers of their pictures (I,)."""

        def some(features: Any) -> Any:
            return features[pictures] if isinstance(features, Tensor) else [features[n] for n in pictures.tolist()]

        levels = [some(level) for level in self.deepstack_features]
        return Seen(some(self.pooler_output), levels, None if self.grid is None else self.grid[pictures])

    def pack(self) -> dict[str, Tensor]:
        """Flat tensors that can be joined to those of other pictures: S tokens of n pictures, or (n, tokens, d) as they came."""
        packed = {"pooled": _flat(self.pooler_output), "counts": torch.tensor([len(one) for one in self.pooler_output])}
        packed |= {f"level.{n}": _flat(level) for n, level in enumerate(self.deepstack_features)}
        return packed if self.grid is None else packed | {"grid": self.grid}

    @staticmethod
    def unpack(packed: dict[str, Tensor]) -> "Seen":
        counts = packed["counts"].tolist()
        pooled, *levels = (_split(packed[name], counts) for name in ("pooled", *level_names(packed)))
        return Seen(pooled, levels, packed.get("grid"))


def _flat(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(list(features))


def _split(flat: Tensor, counts: list[int]) -> Any:
    return flat if flat.ndim == 3 else list(torch.split(flat, counts))


def level_names(packed: dict[str, Tensor]) -> list[str]:
    return [f"level.{n}" for n in range(sum(name.startswith("level.") for name in packed))]


def join(packed: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in packed]) for name in packed[0]}


def see(model: Any, batches: dict[str, dict[str, Tensor]]) -> Seen | None:
    """Of the distinct pictures of `Encoder.collate`: those of "pictures" go through the tower, those of "kept" have been there."""
    found = []
    if pictures := batches.get("pictures"):
        out = model.get_image_features(**pictures, return_dict=True)
        found.append(Seen(out.pooler_output, list(getattr(out, "deepstack_features", [])), pictures.get("image_grid_thw")))
    if kept := batches.get("kept"):
        found.append(Seen.unpack(kept))
    return None if not found else found[0] if len(found) == 1 else Seen.unpack(join([of.pack() for of in found]))


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
    """(1, H, T, d) of pictures one behind the other -> (1, T, H, d), each attending within itself: FlashAttention as torch has it."""
    q, k, v = (of[0].transpose(0, 1) for of in (query, key, value))
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling)
    assert isinstance(out, Tensor)
    return out[None], None


AttentionInterface.register(PACKED, attend_within)


def pack_attention(model: Any, device: torch.device) -> None:
    """Towers whose pictures differ in size (Qwen) attend to them one by one, waiting for the device; a GPU can do all at once."""
    if device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16) and hasattr(model.model, "visual"):
        model.model.visual.config._attn_implementation = PACKED


def tower(model: Any) -> dict[str, Tensor]:
    """The weights between a picture and the language model."""
    decoder = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in decoder}


def is_frozen(model: Any) -> bool:
    return not any(weight.requires_grad for weight in tower(model).values())
