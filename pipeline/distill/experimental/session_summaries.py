"""What K writes of a long session's earlier items, block after block (recurrent summaries, MLLM-MSR, arXiv 2408.09698).

The summary of k blocks is what K writes of the k-th, shown that of the k - 1 before. K is done learning and writes greedily,
in batches that depend neither on the number of processes nor on a kill, so a summary is a function of the items and of K. All
are written once, before the transfer phase, and kept in a file as they come.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device

from pipeline.core.files import canonical_json, replacing
from pipeline.core.interrupt import Interrupt
from pipeline.core.progress import Steps
from pipeline.data.session_log import SessionLog
from pipeline.distill.phases import Phase, starts, summary_key
from pipeline.mllm.model import Mllm, trainable_state
from pipeline.mllm.token_batches import cut


def folds(train: SessionLog, items: int, blocks: int) -> list[dict[str, np.ndarray]]:
    """By number of blocks, from one on: the rows of each summary that a window of a session shows, or that leads to such a one."""
    found: list[dict[str, np.ndarray]] = [{} for _ in range(blocks)]
    for rows in map(train.session, range(len(train))):
        for first in starts(rows, items):
            earlier = rows[max(0, first - blocks * items) : first]
            for n in range(items, len(earlier) + 1, items):
                found[n // items - 1].setdefault(summary_key(earlier[:n]), earlier[:n])
    return found


def write_summaries(mllm: Mllm, phase: Phase, path: Path) -> dict[str, str]:
    """Those of all training sessions, by `summary_key`, written by `mllm` as far as the file `path` does not have them."""
    settings, group, encoder, main = phase.config.distill.transfer, phase.group, phase.encoder, phase.group.rank == 0
    made_by = _made_by(mllm, phase)
    texts = _read(path, made_by)
    group.accelerator.wait_for_everyone()  # before anything is added, all have read the same
    if main:
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(map(_line, [{"made_by": made_by}, texts])))
    levels = folds(phase.train, settings.items, settings.summary)
    greedy = encoder.greedy(settings.summary_tokens)
    there = sum(key in texts for level in levels for key in level)
    with Interrupt() as interrupt, Steps("summaries", sum(map(len, levels)), there, main) as progress:
        for level in levels:
            prompts = {
                key: phase.prompts.summary(texts.get(summary_key(rows[: -settings.items]), ""), rows[-settings.items :])
                for key, rows in level.items()
            }
            keys, lengths = list(prompts), np.array([encoder.length(parts) for parts in prompts.values()], np.int64)
            batches = [[keys[at] for at in batch] for batch in cut(lengths + settings.summary_tokens, phase.config.export.token_budget)]
            todo = [batch for batch in batches if any(key not in texts for key in batch)]
            for first in range(0, len(todo), group.world):
                batch = todo[min(first + group.rank, len(todo) - 1)]  # for want of another the last, as all must go along (`fsdp.py`)
                tensors = encoder.collate({"sessions": [encoder.encode(prompts[key]) for key in batch]})
                tensors = send_to_device(tensors, group.accelerator.device)
                with torch.no_grad():
                    own = dict(zip(batch, encoder.decode(mllm.write(tensors, "sessions", greedy)), strict=True))
                written = {key: text for part in (gather_object([own]) if group.world > 1 else [own]) for key, text in part.items()}
                texts |= written
                if main:
                    with path.open("ab") as file:
                        file.write(_line(written))
                progress.advance(by=len(written))
                if interrupt.agreed(group.accelerator):
                    raise interrupt.exit()
    return texts


def _made_by(mllm: Mllm, phase: Phase) -> str:
    """Of all that a summary depends on beside its rows: K's weights, the items, the prompts, and how much is read and written."""
    digest = hashlib.sha256()
    for name, weight in sorted(trainable_state(mllm).items()):
        digest.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
    settings, config = phase.config.distill.transfer, phase.config
    facts = {
        "weights": digest.hexdigest(),
        "backbone": config.backbone.model_dump(),
        "catalogue": phase.encoder.catalog.sha256,
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
    except (OSError, ValueError):  # none yet, or the line a kill cut short
        pass
    return texts
