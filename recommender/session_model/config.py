"""Defines the shape of a session model, and the constants that its PyTorch form (training) and its numpy form (serving) share."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.core.errors import ARTIFACT, UserError
from pipeline.core.files import read_json

LOG_ZERO = -1e4  # log-weight of a masked component: exp gives 0, and float32 still adds to it without overflow
REPEAT_DISCOUNT_RATE = 8.0  # learning-rate multiplier of the repeat-discount logits: repeats are rare, so their gradients are small
MAX_SCALE = 80.0  # of a channel's logits: exp(89) overflows float32
LEAST_MASS = float(np.finfo(np.float32).tiny)  # smallest exp(score): that of an item to which every component gives zero
FORM = 7  # version of the tensors' names and shapes: a model of another form must be trained anew


@dataclass(frozen=True)
class Parts:
    """Switches the components of the model on and off: see `sbr.parts` in configs/shop.yaml."""

    graph: bool = True
    attention: bool = True
    followers: bool = True
    companions: int = 3
    repeat: bool = True
    popularity: bool = True
    directions: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """Defines a session model together with its tensors; it is published as config.json."""

    items: int
    content_dim: int  # numbers of a whitened vector; 0: ids only
    ids: bool  # False: content only
    dim: int = 64
    max_prefix: int = 20
    id_dropout: float = 0.0  # share of the items whose id a training step hides
    own_loss: float = 0.0  # weight of each channel's own loss
    parts: Parts = field(default_factory=Parts)
    form: int = FORM

    @property
    def hides_ids(self) -> bool:
        """Whether training shows some warm items as cold items, with their content and without their id."""
        return self.ids and self.content_dim > 0 and self.id_dropout > 0


def config_of(folder: Path) -> ModelConfig:
    """Reads the settings of a published session model. Raises `UserError` (4) if an older tpad wrote it."""
    config = read_json(folder / "config.json")
    if config.get("form") != FORM:
        raise UserError(f"session model of an older tpad ({folder}); run `tpad train-sbr`", ARTIFACT)
    return ModelConfig(**config | {"parts": Parts(**config["parts"])})
