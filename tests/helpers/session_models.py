"""A small log, and a session model over it whose every component has something to say."""

import numpy as np
import torch

from recommender.session_model.config import ModelConfig, Parts
from recommender.session_model.model import SessionModel

ITEMS, COLD = 50, 6  # the last items are in no training session


def log(count: int = 80) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, size=count)
    return rng.integers(0, ITEMS - COLD, size=lengths.sum()).astype(np.int32), np.cumsum([0, *lengths])


def build(content: bool = True, ids: bool = True, parts: Parts | None = None, seed: int = 0) -> SessionModel:
    """A model whose every part is at work."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(ITEMS, 12)).astype(np.float32)
    config = ModelConfig(ITEMS, 12 if content else 0, ids, dim=16, max_prefix=8, parts=parts or Parts())
    model = SessionModel(config, vectors if content else None, *log())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
