"""Shards a frozen backbone that does not fit one GPU (FSDP, arXiv 2304.11277, by torch's `fully_shard`).

Each process holds a share of the frozen weights of the language model's layers; a layer is gathered for its forward pass and then freed.
The trainable weights (adapters, heads), their optimiser, the vision tower and the token embeddings are replicated, as in plain data
parallel, so steps, checkpoints and the published MLLM are equal to those of plain data parallel. Cost: the traffic; and all processes
must run the same number of forward passes, so a process with fewer batches repeats some.
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

OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}  # set by the launcher


def wanted(config: Config) -> bool:
    """Tells whether the launcher asks for FSDP. Raises `UserError` for settings that exclude it."""
    for flag, kind in OTHERS.items():
        if os.environ.get(flag, "").lower() == "true":
            raise UserError(f"{kind} is not supported by `tpad distill` (accelerate launch); use configs/accelerate/fsdp2.yaml", USAGE)
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(f"FSDP {version} is not supported (accelerate launch, fsdp_version); use configs/accelerate/fsdp2.yaml", USAGE)
    backbone, variant = config.backbone, config.distill.variant
    for refused, cause in (
        (backbone.lora is None, "a backbone that trains in full (backbone.lora = null)"),
        (backbone.quantize is not None, f"frozen weights in 4 bits (backbone.quantize = {backbone.quantize})"),
        (VARIANTS[variant].published != "last", f"K and T united without alignment (distill.variant = {variant})"),
    ):
        if refused:
            raise UserError(f"FSDP does not go with {cause}; use configs/accelerate/ddp.yaml", USAGE)
    return True


def shard(model: Any, device: torch.device, world: int) -> float:
    """Shards the frozen weights of the language model's layers. Returns the share of all weights that this process holds."""
    mesh, decoder = init_device_mesh(device.type, (world,)), model.get_decoder()
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    fully_shard(decoder, mesh=mesh, ignored_params=set(model.parameters()))  # shards nothing more, but prefetches the layers
    model._is_fsdp_managed_module = True  # makes transformers synchronise the ends of generation
    weights: list[torch.Tensor] = list(model.parameters())
    local = sum((weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in weights)
    return local / sum(weight.nbytes for weight in weights)


def sharded_weights(module: nn.Module) -> list[str]:
    """Lists the names of the sharded weights."""
    return [name for name, weight in module.named_parameters() if isinstance(weight, DTensor)]
