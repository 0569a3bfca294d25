"""Runs a frozen vision tower over every image of the catalogue before training (`distill.vision_cache_gb`)."""

from pathlib import Path

import numpy as np

from pipeline.core.config import Config
from pipeline.core.errors import note
from pipeline.distill.process_group import Group
from pipeline.mllm.backbone import Backbone
from pipeline.mllm.item_images import ModelImages
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.vision_cache import VisionCache
from pipeline.mllm.vision_tower import ImageInput, is_frozen


def fill_vision_cache(config: Config, run: Path, backbone: Backbone, prompts: Prompts, group: Group) -> VisionCache | None:
    """Runs the vision tower once for every image of the catalogue, each process for its share; None where the tower trains."""
    if not is_frozen(backbone.model):
        if group.rank == 0:
            note("note: the vision tower trains, so its output is not cached (distill.vision_cache_gb)")
        return None
    cache = VisionCache(run / "vision", backbone, config.backbone.max_pixels)
    images = ModelImages(config.backbone, backbone, prompts.catalog, memory_bytes=0)
    rows = group.share(np.array([row for row in range(len(prompts)) if prompts.catalog.has_image(row)], np.int64))
    if group.rank == 0:
        cache.clear_others()
    group.accelerator.wait_for_everyone()
    free_bytes = (int(config.distill.vision_cache_gb * 1e9) - cache.size()) // group.world

    def load(row: int) -> ImageInput | None:
        return None if not prompts.has_image(row) or images.key(row) in cache else images.get(row)

    if config.backbone.quantize is None:  # a quantized model is on the device already
        backbone.model.to(group.accelerator.device)
    cache.fill(backbone.model.eval(), load, rows, images.family.stack, free_bytes, config.distill.workers, group.rank == 0)
    group.accelerator.wait_for_everyone()
    cache.refresh()
    return cache
