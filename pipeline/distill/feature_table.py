"""Embeds all items between two phases, on all processes, resumable."""

import math
import time

import numpy as np
import torch
from torch import Tensor

from pipeline.core.checkpoint import SAVE_SECONDS, Checkpoints
from pipeline.core.errors import note
from pipeline.core.interrupt import Interrupt
from pipeline.core.prefetch import loaded_ahead
from pipeline.core.progress import Steps
from pipeline.distill.grad_cache import Chunk
from pipeline.distill.phases import Phase, Tensors
from pipeline.mllm.model import Mllm, embed_batches
from pipeline.mllm.token_batches import cut

TABLE, TABLE_ROWS = "table", 4096  # folder of a table; items per round
ALIKE = 0.9  # mean cosine between items above which features have collapsed; in trained runs it is 0.2 to 0.7


def feature_table(mllm: Mllm, phase: Phase, head: str, checkpoints: Checkpoints) -> Tensor:
    """Embeds all items by one head: (N, D). Resumes from `checkpoints`, and saves there.

    Warns where the features hardly differ, because later phases cannot learn from them.
    """
    accelerator, count, main = phase.group.accelerator, len(phase.prompts), phase.group.rank == 0
    done, tensors, _ = checkpoints.newest() or (0, {head: torch.empty(0, phase.config.distill.dim)}, {})
    with checkpoints.resuming():
        table, saved = tensors[head].reshape(done, phase.config.distill.dim).to(accelerator.device), time.monotonic()
    with Interrupt() as interrupt, Steps(f"{head} table", count, done, show=main) as progress:
        for first in range(done, count, TABLE_ROWS):
            rows = np.arange(first, min(first + TABLE_ROWS, count))
            table = torch.cat([table, item_features(mllm, phase, rows, (head,), phase.config.distill.workers)[head]])
            progress.advance(by=len(rows))
            stop = interrupt.agreed(accelerator)
            if main and (stop or len(table) == count or time.monotonic() - saved > SAVE_SECONDS):
                checkpoints.save(len(table), {head: table}, {})
                saved = time.monotonic()
            if stop:
                raise interrupt.exit()
    if main and (alike := float(table.mean(0).square().sum())) > ALIKE:  # of unit vectors: the mean of all cosines
        note(
            f"warning: the {head} features of two items have a cosine of {alike:.3f} on average, so that they hardly tell items apart "
            f"({phase.name}); see that the texts and images differ (data.text), or take more steps (distill.{phase.name}.steps)"
        )
    return table


def item_features(mllm: Mllm, phase: Phase, rows: np.ndarray, heads: tuple[str, ...], workers: int = 0) -> Tensors:
    """Embeds items, each process its share: (n, D) by head, the same on all processes."""
    group, processor, device = phase.group, phase.processor, phase.group.accelerator.device
    share = group.share(np.resize(rows, math.ceil(len(rows) / group.world) * group.world))
    lengths = np.array([processor.length(phase.prompts.item(int(row))) for row in share])
    places = cut(lengths, phase.config.export.token_budget)
    passes = [min(n, len(places) - 1) for n in range(group.most(len(places)))]  # the same number on all processes (see `fsdp.py`)

    def load(number: int) -> Chunk:
        return processor.collate({"items": [processor.encode(phase.prompts.item(int(row))) for row in share[places[number]]]})

    features = embed_batches(mllm, places, loaded_ahead(load, passes, workers), heads, device)
    return {head: group.gather(torch.from_numpy(part).to(device))[: len(rows)] for head, part in features.items()}
