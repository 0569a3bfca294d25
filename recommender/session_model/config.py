"""What a session model is made of, and the numbers that its two forms share: PyTorch, which trains, and numpy, which serves."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.core.errors import ARTIFACT, UserError

NEVER = -1e4  # log-weight of what cannot be: exp gives 0, and float32 still adds to it
SEEN_RATE = 8.0  # of the logits of what an item loses for having been seen: repeats are so rare that these would hardly move else
MAX_SCALE = 80.0  # of a channel's logits: exp of 89 is no float32
LEAST_MASS = float(np.finfo(np.float32).tiny)  # exp of the score of an item that no component can bring
FORM = 6  # of the tensors: models of another one are trained anew


@dataclass(frozen=True)
class Parts:
    """Each with its switch: see `sbr.parts` in configs/shop.yaml."""

    graph: bool = True
    attention: bool = True
    followers: bool = True
    companions: int = 3
    repeat: bool = True
    popularity: bool = True


@dataclass(frozen=True)
class ModelConfig:
    items: int
    content_dim: int  # of the whitened vectors; 0: ids only
    ids: bool  # False: content only
    dim: int = 64
    max_prefix: int = 20
    id_dropout: float = 0.0  # of whole items
    own_loss: float = 0.0
    parts: Parts = field(default_factory=Parts)
    form: int = FORM

    @property
    def hides_ids(self) -> bool:
        """Whether training shows some known items as strangers, by their content alone."""
        return self.ids and self.content_dim > 0 and self.id_dropout > 0


def config_of(folder: Path) -> ModelConfig:
    """Of a published session model. Raises `UserError` (4)."""
    config = json.loads((folder / "config.json").read_bytes())
    if config.get("form") != FORM:
        raise UserError(f"session model of an older tpad ({folder}); run `tpad train-sbr`", ARTIFACT)
    return ModelConfig(**config | {"parts": Parts(**config["parts"])})
