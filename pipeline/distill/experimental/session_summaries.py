"""Summarises the earlier items of long sessions with K, block by block (recurrent summaries, MLLM-MSR, arXiv 2408.09698).

The prompt for the k-th block contains the summary of the k - 1 blocks before. K is trained by then and generates greedily, in batches that
depend neither on the number of processes nor on a kill, so a summary is a function of the items and of K. All summaries are written once,
before the transfer phase, and appended to a file.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device

from pipeline.core.files import canonical_json, replacing
from pipeline.core.interrupt import Interrupt
from pipeline.core.progress import Steps
from pipeline.data.session_log import SessionLog
from pipeline.distill.experimental.hook import Option
from pipeline.distill.phases import Phase
from pipeline.distill.windows import window_starts
from pipeline.mllm.model import Mllm, trainable_state
from pipeline.mllm.token_batches import cut


def summary_key(rows: np.ndarray) -> str:
    """Hashes the items (n,) of a summary: its name in the file."""
    return hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()


class SessionSummaries(Option):
    """Adds the summary of up to `blocks` blocks of `items` items before a window to its prompt."""

    def __init__(self, texts: Mapping[str, str], items: int, blocks: int) -> None:
        self.texts, self.items, self.blocks = texts, items, blocks

    def prompt_parts(self, session: np.ndarray, first: int, window: np.ndarray) -> dict[str, str]:
        earlier = session[max(0, first - self.blocks * self.items) : first]
        return {"history": self.texts[summary_key(earlier)]} if first else {}


def folds(train: SessionLog, items: int, blocks: int) -> list[dict[str, np.ndarray]]:
    """Lists the summaries that the windows of all sessions need, by number of blocks, from one on: `summary_key` -> rows."""
    levels: list[dict[str, np.ndarray]] = [{} for _ in range(blocks)]
    for rows in map(train.session, range(len(train))):
        for first in window_starts(rows, items):
            earlier = rows[max(0, first - blocks * items) : first]
            for n in range(items, len(earlier) + 1, items):
                levels[n // items - 1].setdefault(summary_key(earlier[:n]), earlier[:n])
    return levels


def write_summaries(mllm: Mllm, phase: Phase, path: Path) -> dict[str, str]:
    """Writes the summaries of all training sessions that the file `path` lacks. Returns all of them, by `summary_key`."""
    settings, group, processor, main = phase.config.distill.transfer, phase.group, phase.processor, phase.group.rank == 0
    made_by = _made_by(mllm, phase)
    texts = _read(path, made_by)
    group.accelerator.wait_for_everyone()  # all processes read the file before anything is added
    if main:
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(map(_line, [{"made_by": made_by}, texts])))
    levels = folds(phase.train, settings.items, settings.summary)
    greedy = processor.greedy(settings.summary_tokens)
    finished = sum(key in texts for level in levels for key in level)
    with Interrupt() as interrupt, Steps("summaries", sum(map(len, levels)), finished, main) as progress:
        for level in levels:
            prompts = {
                key: phase.prompts.summary(texts.get(summary_key(rows[: -settings.items]), ""), rows[-settings.items :])
                for key, rows in level.items()
            }
            keys, lengths = list(prompts), np.array([processor.length(parts) for parts in prompts.values()], np.int64)
            batches = [[keys[n] for n in batch] for batch in cut(lengths + settings.summary_tokens, phase.config.export.token_budget)]
            todo = [batch for batch in batches if any(key not in texts for key in batch)]
            for first in range(0, len(todo), group.world):
                batch = todo[min(first + group.rank, len(todo) - 1)]  # repeats the last batch: all processes must run (see `fsdp.py`)
                tensors = processor.collate({"sessions": [processor.encode(prompts[key]) for key in batch]})
                tensors = send_to_device(tensors, group.accelerator.device)
                with torch.no_grad():
                    local = dict(zip(batch, processor.decode(mllm.write(tensors, "sessions", greedy)), strict=True))
                written = {key: text for part in (gather_object([local]) if group.world > 1 else [local]) for key, text in part.items()}
                texts |= written
                if main:
                    with path.open("ab") as file:
                        file.write(_line(written))
                progress.advance(by=len(written))
                if interrupt.agreed(group.accelerator):
                    raise interrupt.exit()
    return texts


def _made_by(mllm: Mllm, phase: Phase) -> str:
    """Hashes everything that a summary depends on beside its rows: K's weights, the items, the prompts, and the lengths."""
    digest = hashlib.sha256()
    for name, weight in sorted(trainable_state(mllm).items()):
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    settings, config = phase.config.distill.transfer, phase.config
    facts = {
        "weights": digest.hexdigest(),
        "backbone": config.backbone.model_dump(),
        "catalogue": phase.processor.catalog.sha256,
        "data": config.data.model_dump(exclude={"prompts"}),
        "templates": phase.prompts.templates.model_dump(),
        "amounts": [settings.items, settings.summary_tokens, config.export.token_budget],
    }
    return hashlib.sha256(canonical_json(facts)).hexdigest()


def _line(entry: dict[str, str]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _read(path: Path, made_by: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) == {"made_by": made_by}:
            for line in lines:
                texts |= json.loads(line)
    except (OSError, ValueError):  # no file yet, or a last line that a kill cut short
        pass
    return texts
