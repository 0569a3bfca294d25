"""Puts fused GPU kernels in place of a backbone's norms, rotary embeddings and gated layers: `backbone.kernels`, by liger-kernel.

Element-wise kernels, which write and read every state once more each, took two fifths of an export's time on a GPU (docs/experiments.md).
"""

from importlib.util import find_spec
from typing import Any

import torch

from pipeline.core.config import BackboneConfig
from pipeline.core.errors import ENVIRONMENT, UserError

SEPARATE = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the losses are tpad's own


def fuse(model: Any, config: BackboneConfig) -> None:
    """Fuses what liger-kernel knows of the model, or of its language model alone. Raises `UserError` (5) if `liger` cannot be had."""
    lacking = "no GPU" if not torch.cuda.is_available() else "" if find_spec("liger_kernel") else "liger-kernel is not installed"
    if lacking and config.kernels == "liger":
        raise UserError(f"no fused kernels: {lacking} (backbone.kernels); install the extra `gpu`, or set it to auto", ENVIRONMENT)
    if lacking or config.kernels == "none":
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    known = model if model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else model.get_decoder()
    if known.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        _apply_liger_kernel_to_instance(known, **SEPARATE)
    elif config.kernels == "liger":
        raise UserError(f"liger-kernel has none for `{known.config.model_type}` (backbone.kernels); set it to auto", ENVIRONMENT)
