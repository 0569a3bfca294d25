"""RecBole's SASRec (Zhao et al., CIKM 2021) with its own defaults, for benchmarks/sbr.py.

    pip install --no-deps recbole thop texttable && pip install colorlog colorama tabulate tensorboard

Only its model is used, in a bare loop over ready tensors: without its data sets, loaders and trainer.
"""

from types import SimpleNamespace

import torch
from recbole.model.sequential_recommender import SASRec
from torch import Tensor, nn

DEFAULTS = {  # recbole/properties
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length",
    "NEG_PREFIX": "neg_",
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dropout_prob": 0.5,
    "attn_dropout_prob": 0.5,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "loss_type": "CE",
}


class RecBoleSASRec(nn.Module):
    """Of `items` items, each sequence padded to `longest` events as its loader does."""

    def __init__(self, items: int, dim: int, longest: int, device: torch.device) -> None:
        super().__init__()
        settings = DEFAULTS | {"hidden_size": dim, "inner_size": 4 * dim, "MAX_ITEM_LIST_LENGTH": longest, "device": device}
        self.longest, self.device = longest, device
        self.model = SASRec(settings, SimpleNamespace(num=lambda _: items + 1))

    def forward(self, prefixes: list[list[int]]) -> Tensor:
        """Scores of padding and all items, (B, 1 + N)."""
        padded = torch.tensor([prefix + [0] * (self.longest - len(prefix)) for prefix in prefixes], device=self.device)
        lengths = torch.tensor([len(prefix) for prefix in prefixes], device=self.device)
        scores: Tensor = self.model.full_sort_predict({"item_id_list": padded, "item_length": lengths})
        return scores
