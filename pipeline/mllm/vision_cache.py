"""What the vision tower has made of every picture, kept on the disk by `tpad distill`.

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
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.core.artifact import environment
from pipeline.core.files import canonical_json, remove, replacing, sha256_file
from pipeline.core.prefetch import loaded_ahead
from pipeline.core.progress import Steps
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.vision_tower import Picture, join, level_names, see, tower

SHARD_BYTES = 64 << 20
TOGETHER = 8  # pictures through the tower at a time, when they are to be kept


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
        for name in ("pooled", *level_names(self.tensors)):
            flat = self.tensors[name]
            kept[name] = flat[n : n + 1] if flat.ndim == 3 else flat[self.tokens[n] : self.tokens[n + 1]]
        if "grid" in self.tensors:
            kept["grid"] = self.tensors["grid"][n : n + 1]
        return Picture(key, self.tensors["ids"][self.ids[n] : self.ids[n + 1]].tolist(), {}, kept)
