"""Stores the output of a frozen vision tower on the disk, for every image of a catalogue.

A frozen tower gives the same features for an image in every step of every phase, and in the export. With
`distill.vision_cache_gb`, `tpad distill` runs it once for every image before training; afterwards neither does the tower run nor
are images decoded. The files are in `run/vision/HASH`, where HASH covers everything that determines the features (the tower's
weights, the image processor, the image budget). Each file is named by its sha256, so it is complete or absent; a damaged file is
deleted, and its images go through the tower again. Images are recognised by a hash of their bytes, so a changed image is never
mistaken for the old one. Images that are no longer in the catalogue keep their space.
"""

import hashlib
from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.core.artifact import environment
from pipeline.core.errors import note
from pipeline.core.files import canonical_json, remove, replacing, sha256_file
from pipeline.core.prefetch import loaded_ahead
from pipeline.core.progress import Steps
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.vision_tower import ImageInput, run_vision_tower, tower

FORM = 2  # of the files; raise it when they change
SHARD_BYTES = 64 << 20
TOGETHER = 8  # images through the tower at a time, when the cache is filled


class VisionCache:
    """The cached vision features of one backbone and one image budget. Several processes may read it while others add to it."""

    def __init__(self, root: Path, backbone: Backbone, max_pixels: int | None) -> None:
        facts = {"form": FORM, "max_pixels": max_pixels, "transformers": transformers.__version__}
        digest = hashlib.sha256(canonical_json(facts))
        digest.update(backbone.image_processor.to_json_string().encode())
        for name, weight in sorted(tower(backbone.model).items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        self.folder = root / digest.hexdigest()[:32]
        self.refresh()

    def refresh(self) -> None:
        """Reads again which images the files in the folder hold."""
        self.place: dict[bytes, tuple[Path, list[str]]] = {}  # key of an image -> its file, and its tensors there
        self._open: dict[Path, dict[str, Tensor]] = {}  # verified files, mapped into memory
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    entries = [(bytes.fromhex(entry.partition("/")[0]), entry) for entry in sorted(file.keys())]
            except (OSError, SafetensorError, ValueError):
                self._drop(path)
                continue
            self.place |= {key: (path, [entry for _, entry in group]) for key, group in groupby(entries, itemgetter(0))}

    def __contains__(self, key: bytes) -> bool:
        return key in self.place

    def size(self) -> int:
        """Returns the size of all files in bytes."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def find(self, key: bytes) -> ImageInput | None:
        """Returns the image with its features, or None if they are not cached. Verifies a file when it is first used."""
        if key not in self.place:
            return None
        path, entries = self.place[key]
        if path not in self._open:
            if not path.exists() or sha256_file(path) != path.stem:  # missing: another process has dropped it
                self._drop(path)
                return None
            self._open[path] = load_file(path)
        tensors = {entry.partition("/")[2]: self._open[path][entry] for entry in entries}
        return ImageInput(key, tensors.pop("ids").tolist(), {}, tensors)

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
        shard: dict[str, Tensor] = {}
        size = 0
        with Steps("vision", len(rows), show=show) as progress, torch.inference_mode():
            for group, loaded in zip(groups, loader, strict=True):
                fresh = list({image.key: image for image in loaded if image is not None and image.key not in done}.values())
                if fresh:
                    tensors = {name: t.to(device) for name, t in stack([image.tensors for image in fresh]).items()}
                    features = run_vision_tower(model, {"images": tensors})
                    assert features is not None
                    entries: dict[str, Tensor] = {}
                    for n, image in enumerate(fresh):
                        packed = features.select(torch.tensor([n])).pack() | {"ids": torch.tensor(image.ids)}
                        entries |= {f"{image.key.hex()}/{name}": t.cpu().contiguous() for name, t in packed.items()}
                    grown = len(save(entries))
                    if grown > room:
                        note(f"note: the vision cache is full after {progress.done} of {len(rows)} images")
                        break
                    shard |= entries
                    room, size = room - grown, size + grown
                    done |= {image.key for image in fresh}
                if size >= SHARD_BYTES:
                    self._write(shard)
                    shard, size = {}, 0
                progress.advance(by=len(group))
        if shard:
            self._write(shard)

    def _write(self, shard: dict[str, Tensor]) -> None:
        data = save(shard)
        with environment(self.folder), replacing(self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors") as temporary:
            temporary.write_bytes(data)
