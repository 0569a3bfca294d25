"""Fingerprints of the phases and of the published MLLM: equal fingerprints mean equal weights."""

import hashlib
from typing import Any

from pipeline.core.config import Config
from pipeline.core.files import canonical_json
from pipeline.data.session_log import SessionLog
from pipeline.distill.experimental.soft_targets import Teacher
from pipeline.distill.phases import PHASES, Align, Transfer
from pipeline.distill.variants import VARIANTS
from pipeline.mllm.item_vectors import VECTORS, table_sha256
from pipeline.mllm.prompts import VERSION as PROMPTS_VERSION
from pipeline.mllm.prompts import Prompts
from pipeline.mllm.tiny_backbone import TOKENIZER


def fingerprints(config: Config, prompts: Prompts, train: SessionLog, teacher: Teacher | None, backbone_sha256: str | None) -> list[str]:
    """Hashes everything that the weights depend on: one fingerprint a phase, the last one for the published MLLM.

    The checkpoint interval, the number of processes, the chunk size, the vision cache and fused kernels are left out: they do not
    change the weights.
    """
    chain: dict[str, Any] = {
        "prompts": PROMPTS_VERSION,
        "templates": prompts.templates.model_dump(),
        "seed": config.seed,
        "data": config.data.model_dump(exclude={"protocol", "valid", "test", "max_prefix", "neighbours", "prompts"}),
        # of a local folder the content counts, not its name
        "backbone": config.backbone.model_dump(exclude={"path", "kernels", "name"} if backbone_sha256 else {"path", "kernels"})
        | ({"tokenizer": TOKENIZER} if config.backbone.name == "tiny" else {}),
        "weights": backbone_sha256,
        "dim": config.distill.dim,
        "critic": config.distill.critic.model_dump(),
        "catalogue": prompts.catalog.sha256,
        "sessions": _content_sha256(train),
    }
    if config.backbone.name == VECTORS:
        chain["vectors"] = table_sha256(config.backbone)
    if prompts.neighbours is not None:
        chain["neighbours"] = prompts.neighbours.settings()
    variant = VARIANTS[config.distill.variant]
    if variant.frozen:
        chain["frozen"] = True
    hashes = []
    for kind in PHASES:
        chain[kind.name] = getattr(config.distill, kind.name).model_dump(exclude={"teacher"})
        if kind is Transfer:
            chain["teacher"] = teacher and teacher.sha256
        hashes.append(hashlib.sha256(canonical_json(chain)).hexdigest())
        if kind.name == variant.last:
            break
    if variant.last != Align.name:  # the same phases can be published in several forms
        chain["published"] = config.distill.merge.model_dump() if variant.published == "merge" else variant.published
        hashes.append(hashlib.sha256(canonical_json(chain)).hexdigest())
    return hashes


def _content_sha256(log: SessionLog) -> str:
    """Hashes the sessions with their items; `ids_sha256`, which manifests hold, covers the ids only."""
    return hashlib.sha256(log.ids_sha256().encode() + log.offsets.tobytes() + log.rows.tobytes()).hexdigest()
