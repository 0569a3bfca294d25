"""What the vision tower makes of a picture: computed, or read from where `tpad distill` has kept it.

A tower that does not train makes the same of a picture in every step of every phase, and in the export. With
`distill.vision_cache_gb` every picture goes through it once, before training; then neither is it run again nor the
picture decoded. Kept in `run/vision/HASH`, where HASH stands for everything that decides what the tower says (its weights,
the image processor, the image budget), in files that bear their sha256 as their name: a file is whole or it is not there, and
one that was damaged since is dropped, its pictures going through the tower again. A picture is known by the bytes of its
file, so a changed one is never mistaken. Pictures that no longer belong to the catalogue keep their place.
"""

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from pipeline.backbone import Backbone
from pipeline.core.artifact import environment
from pipeline.core.files import canonical_json, remove, replacing, sha256_file
from pipeline.core.prefetch import loaded_ahead
from pipeline.core.progress import Steps

SHARD_BYTES = 64 << 20
PACKED = "tpad_flash"  # transformers gives the bounds of the pictures to what has "flash" in its name
TOGETHER = 8  # pictures through the tower at a time, when they are to be kept


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
        pooled, *levels = (_split(packed[name], counts) for name in ("pooled", *_levels(packed)))
        return Seen(pooled, levels, packed.get("grid"))


def _flat(features: Any) -> Tensor:
    return features if isinstance(features, Tensor) else torch.cat(list(features))


def _split(flat: Tensor, counts: list[int]) -> Any:
    return flat if flat.ndim == 3 else list(torch.split(flat, counts))


def _levels(packed: dict[str, Tensor]) -> list[str]:
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


class Cache:
    """The kept pictures of one backbone, of one image budget. Several processes may read it while others add to it."""

    def __init__(self, root: Path, backbone: Backbone, max_pixels: int | None) -> None:
        digest = hashlib.sha256(canonical_json({"max_pixels": max_pixels, "transformers": transformers.__version__}))
        digest.update(backbone.image_processor.to_json_string().encode())
        for name, weight in sorted(tower(backbone.model).items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        self.folder = root / digest.hexdigest()[:32]
        self.refresh()

    def refresh(self) -> None:
        """Looks at what is there now."""
        self.place: dict[bytes, tuple[Path, int]] = {}  # of a picture: its file, and its number in it
        self._open: dict[Path, Shard] = {}  # those that were verified
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                keys = load_file(path)["keys"].numpy()
            except (OSError, SafetensorError, KeyError, ValueError):
                self._drop(path)
                continue
            self.place |= {key.tobytes(): (path, n) for n, key in enumerate(keys)}

    def __contains__(self, key: bytes) -> bool:
        return key in self.place

    def size(self) -> int:
        """In bytes."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def find(self, key: bytes) -> Picture | None:
        path, number = self.place.get(key, (None, 0))
        if path is None:
            return None
        if path not in self._open:
            if not path.exists() or sha256_file(path) != path.stem:  # not there: another process has dropped it
                self._drop(path)
                return None
            self._open[path] = Shard(path)
        return self._open[path].picture(key, number)

    def _drop(self, path: Path) -> None:
        print(f"warning: kept pictures are damaged and left out ({path})", file=sys.stderr)
        self.place = {key: at for key, at in self.place.items() if at[0] != path}
        remove(path)

    def clear_others(self) -> None:
        """What was kept of another tower or budget, and what a kill has left unfinished: one process, before any adds to it."""
        for other in [*self.folder.parent.glob("*"), *self.folder.glob(".*.tmp")]:
            if other != self.folder:
                remove(other)

    def fill(
        self,
        model: Any,
        load: Callable[[int], Picture | None],
        rows: np.ndarray,
        stack: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]],
        room: int,
        workers: int,
        show: bool,
    ) -> None:
        """Adds the pictures that `load` gives for `rows`, as long as they take no more than `room` bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        device, done = next(model.parameters()).device, set(self.place)
        groups = [[int(row) for row in rows[first : first + TOGETHER]] for first in range(0, len(rows), TOGETHER)]
        loader = loaded_ahead(lambda n: [load(row) for row in groups[n]], range(len(groups)), workers)
        shard: list[dict[str, Tensor]] = []
        size = 0
        with Steps("vision", len(rows), show=show) as progress, torch.inference_mode():
            for group, loaded in zip(groups, loader, strict=True):
                fresh = list({p.key: p for p in loaded if p is not None and p.key not in done}.values())
                if fresh:
                    tensors = {name: t.to(device) for name, t in stack([p.tensors for p in fresh]).items()}
                    seen = see(model, {"pictures": tensors})
                    assert seen is not None
                    shard.append({name: t.cpu() for name, t in seen.pack().items()} | _names(fresh))
                    grown = sum(t.nbytes for t in shard[-1].values())
                    if grown > room:
                        print(f"note: the vision cache is full after {progress.done} of {len(rows)} pictures", file=sys.stderr)
                        shard.pop()
                        break
                    room, size = room - grown, size + grown
                    done |= {p.key for p in fresh}
                if size >= SHARD_BYTES:
                    self._write(shard)
                    shard, size = [], 0
                progress.advance(by=len(group))
        if shard:
            self._write(shard)

    def _write(self, shard: list[dict[str, Tensor]]) -> None:
        data = save({name: t.contiguous() for name, t in join(shard).items()})
        with environment(self.folder), replacing(self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors") as temporary:
            temporary.write_bytes(data)


def _names(pictures: Sequence[Picture]) -> dict[str, Tensor]:
    """What else than features must be known of a picture that is not decoded."""
    return {
        "keys": torch.from_numpy(np.frombuffer(b"".join(p.key for p in pictures), np.uint8).reshape(-1, 32).copy()),
        "ids": torch.tensor([token for p in pictures for token in p.ids]),
        "lengths": torch.tensor([len(p.ids) for p in pictures]),
    }


class Shard:
    """One file of kept pictures, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path)
        self.tokens, self.ids = (np.cumsum([0, *self.tensors.pop(name).tolist()]) for name in ("counts", "lengths"))

    def picture(self, key: bytes, n: int) -> Picture:
        kept = {"counts": torch.tensor([self.tokens[n + 1] - self.tokens[n]])}
        for name in ("pooled", *_levels(self.tensors)):
            flat = self.tensors[name]
            kept[name] = flat[n : n + 1] if flat.ndim == 3 else flat[self.tokens[n] : self.tokens[n + 1]]
        if "grid" in self.tensors:
            kept["grid"] = self.tensors["grid"][n : n + 1]
        return Picture(key, self.tensors["ids"][self.ids[n] : self.ids[n + 1]].tolist(), {}, kept)
