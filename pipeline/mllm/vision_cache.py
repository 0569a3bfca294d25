"""Stores the output of a frozen vision tower on the disk, for every image of a catalogue.

A frozen tower gives the same features for an image in every step of every phase, and in the export. With
`distill.vision_cache_gb`, `tpad distill` runs it once for every image before training; afterwards neither does the tower run nor
are images decoded. The files are in `run/vision/HASH`, where HASH covers everything that determines the features (the tower's
weights, the image processor, the image budget). Each file is named by its sha256, so it is complete or absent; a damaged file is
deleted, and its images go through the tower again. Images are recognised by a hash of their bytes, so a changed image is never
mistaken for the old one. Images that are no longer in the catalogue keep their space.
"""

import hashlib
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
from pipeline.core.errors import note
from pipeline.core.files import canonical_json, remove, replacing, sha256_file
from pipeline.core.prefetch import loaded_ahead
from pipeline.core.progress import Steps
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.vision_tower import ImageInput, join, level_names, run_vision_tower, tower

SHARD_BYTES = 64 << 20
TOGETHER = 8  # images through the tower at a time, when the cache is filled


class VisionCache:
    """The cached vision features of one backbone and one image budget. Several processes may read it while others add to it."""

    def __init__(self, root: Path, backbone: Backbone, max_pixels: int | None) -> None:
        digest = hashlib.sha256(canonical_json({"max_pixels": max_pixels, "transformers": transformers.__version__}))
        digest.update(backbone.image_processor.to_json_string().encode())
        for name, weight in sorted(tower(backbone.model).items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        self.folder = root / digest.hexdigest()[:32]
        self.refresh()

    def refresh(self) -> None:
        """Reads again which images the files in the folder hold."""
        self.place: dict[bytes, tuple[Path, int]] = {}  # key of an image -> its file, and its number in the file
        self._open: dict[Path, CacheFile] = {}  # verified files
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
        """Returns the size of all files in bytes."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def find(self, key: bytes) -> ImageInput | None:
        """Returns the image with its features, or None if they are not cached. Verifies a file when it is first used."""
        path, number = self.place.get(key, (None, 0))
        if path is None:
            return None
        if path not in self._open:
            if not path.exists() or sha256_file(path) != path.stem:  # missing: another process has dropped it
                self._drop(path)
                return None
            self._open[path] = CacheFile(path)
        return self._open[path].image(key, number)

    def _drop(self, path: Path) -> None:
        note(f"warning: cached vision features are damaged and left out ({path})")
        self.place = {key: entry for key, entry in self.place.items() if entry[0] != path}
        remove(path)

    def clear_others(self) -> None:
        """Removes the caches of other towers and budgets, and unfinished files. For one process, before any process adds to the cache."""
        for other in [*self.folder.parent.glob("*"), *self.folder.glob(".*.tmp")]:
            if other != self.folder:
                remove(other)

    def fill(
        self,
        model: Any,
        load: Callable[[int], ImageInput | None],
        rows: np.ndarray,
        stack: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]],
        room: int,
        workers: int,
        show: bool,
    ) -> None:
        """Adds the features of the images that `load` returns for `rows`, up to `room` bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        device, done = next(model.parameters()).device, set(self.place)
        groups = [[int(row) for row in rows[first : first + TOGETHER]] for first in range(0, len(rows), TOGETHER)]
        loader = loaded_ahead(lambda n: [load(row) for row in groups[n]], range(len(groups)), workers)
        shard: list[dict[str, Tensor]] = []
        size = 0
        with Steps("vision", len(rows), show=show) as progress, torch.inference_mode():
            for group, loaded in zip(groups, loader, strict=True):
                fresh = list({image.key: image for image in loaded if image is not None and image.key not in done}.values())
                if fresh:
                    tensors = {name: t.to(device) for name, t in stack([image.tensors for image in fresh]).items()}
                    features = run_vision_tower(model, {"images": tensors})
                    assert features is not None
                    shard.append({name: t.cpu() for name, t in features.pack().items()} | _names(fresh))
                    grown = sum(t.nbytes for t in shard[-1].values())
                    if grown > room:
                        note(f"note: the vision cache is full after {progress.done} of {len(rows)} images")
                        shard.pop()
                        break
                    room, size = room - grown, size + grown
                    done |= {image.key for image in fresh}
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


def _names(images: Sequence[ImageInput]) -> dict[str, Tensor]:
    """Returns what else is needed to use an image without decoding it: keys (n, 32), token ids, and how many ids each image has."""
    return {
        "keys": torch.from_numpy(np.frombuffer(b"".join(image.key for image in images), np.uint8).reshape(-1, 32).copy()),
        "ids": torch.tensor([token for image in images for token in image.ids]),
        "lengths": torch.tensor([len(image.ids) for image in images]),
    }


class CacheFile:
    """One file of cached features, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path)
        self.tokens, self.ids = (np.cumsum([0, *self.tensors.pop(name).tolist()]) for name in ("counts", "lengths"))

    def image(self, key: bytes, n: int) -> ImageInput:
        """Returns the n-th image of the file, whose key is `key`."""
        features = {"counts": torch.tensor([self.tokens[n + 1] - self.tokens[n]])}
        for name in ("pooled", *level_names(self.tensors)):
            flat = self.tensors[name]
            features[name] = flat[n : n + 1] if flat.ndim == 3 else flat[self.tokens[n] : self.tokens[n + 1]]
        if "grid" in self.tensors:
            features["grid"] = self.tensors["grid"][n : n + 1]
        return ImageInput(key, self.tensors["ids"][self.ids[n] : self.ids[n + 1]].tolist(), {}, features)
