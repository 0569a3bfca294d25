"""A frozen backbone in pieces, where it does not fit one GPU (FSDP, arXiv 2304.11277, by torch's `fully_shard`).

Of the frozen weights of the language model's layers every process holds its share; a layer is put together to be run, and
taken apart again. What trains (adapters, heads), its optimiser, the vision tower and the token embeddings stay whole everywhere, as in
plain data parallel: so steps, checkpoints and what is published are those of plain data parallel. The price beside the traffic:
all processes must make the same forward passes, so one that has less to embed repeats some.
"""

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from pipeline.core.config import Config
from pipeline.core.errors import USAGE, UserError
from pipeline.distill.variants import VARIANTS

OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}  # what the launcher sets for them


def wanted(config: Config) -> bool:
    """Whether the launcher asks for it. Raises `UserError` for what it does not go with."""
    for flag, kind in OTHERS.items():
        if os.environ.get(flag, "").lower() == "true":
            raise UserError(f"{kind} is not supported by `tpad distill` (accelerate launch); use configs/accelerate/fsdp2.yaml", USAGE)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(f"FSDP {version} is not supported (accelerate launch, fsdp_version); use configs/accelerate/fsdp2.yaml", USAGE)
    backbone, variant = config.backbone, config.distill.variant
    for refused, what in (
        (backbone.lora is None, "a backbone that trains in full (backbone.lora = null)"),
        (backbone.quantize is not None, f"frozen weights in 4 bits (backbone.quantize = {backbone.quantize})"),
        (VARIANTS[variant].published != "last", f"K and T united without alignment (distill.variant = {variant})"),
    ):
        if refused:
            raise UserError(f"FSDP does not go with {what}; use configs/accelerate/ddp.yaml", USAGE)
    return True


def cut(model: Any, device: torch.device, world: int) -> float:
    """Leaves this process its share of the frozen weights of the language model's layers. Returns how much of all weights that is."""
    mesh, decoder = init_device_mesh(device.type, (world,)), model.get_decoder()
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(decoder, mesh=mesh, ignored_params=set(model.parameters()))  # cuts nothing more, and has layers fetched in advance
    model._is_fsdp_managed_module = True  # by which transformers lets no process be done writing before all are
    weights: list[torch.Tensor] = list(model.parameters())
    held = sum((weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in weights)
    return held / sum(weight.nbytes for weight in weights)


def pieces(module: nn.Module) -> list[str]:
    """Names of the weights of which other processes hold the rest."""
    return [name for name, weight in module.named_parameters() if isinstance(weight, DTensor)]
