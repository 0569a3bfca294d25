"""Small session models with random weights, for tests of the session model, its index and its calibration."""

import numpy as np
import torch

from recommender.session_model.config import ModelConfig, Parts
from recommender.session_model.model import SessionModel

ITEMS, COLD = 50, 6  # the last COLD items are in no training session


def training_sessions(count: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Draws random sessions of warm items: rows and offsets."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, size=count)
    return rng.integers(0, ITEMS - COLD, size=lengths.sum()).astype(np.int32), np.cumsum([0, *lengths])


def random_model(content: bool = True, ids: bool = True, parts: Parts | None = None, seed: int = 0) -> SessionModel:
    """Builds a model whose every component has an influence: noise is added to all parameters."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(ITEMS, 12)).astype(np.float32)
    config = ModelConfig(ITEMS, 12 if content else 0, ids, dim=16, max_prefix=8, parts=parts or Parts())
    model = SessionModel(config, vectors if content else None, *training_sessions())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
