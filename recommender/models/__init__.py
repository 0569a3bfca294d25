"""Every session model there is, by the name it has in `sbr.models` and in the tables.

To add one: a file with an encoder (see `sequence`), and a line of `ENCODERS`.
"""

from typing import NamedTuple

from pipeline.core.errors import USAGE, UserError
from recommender.models.gru4rec import GRU4Rec
from recommender.models.narm import NARM
from recommender.models.sasrec import SASRec
from recommender.models.sequence import Encoder, SequenceModel
from recommender.models.sr_gnn import SRGNN
from recommender.session_model.model import SessionModel

ENCODERS: dict[str, Encoder] = {"GRU4Rec": GRU4Rec, "NARM": NARM, "SR-GNN": SRGNN, "SASRec": SASRec}


class Recipe(NamedTuple):
    encoder: Encoder | None  # of a SequenceModel; None: our own SessionModel
    content: bool  # knows items by the exported vectors
    ids: bool  # knows items by their ids


MODELS = {  # in the order of training and of the tables: the literature's, then ours; full last of all
    **{name: Recipe(encoder, False, True) for name, encoder in ENCODERS.items()},
    **{f"{name} on vectors": Recipe(encoder, True, False) for name, encoder in ENCODERS.items()},
    **{f"{name} on ids and vectors": Recipe(encoder, True, True) for name, encoder in ENCODERS.items()},
    "ID-only": Recipe(None, False, True),
    "content-only": Recipe(None, True, False),
    "full": Recipe(None, True, True),
}

Model = SessionModel | SequenceModel


def chosen(names: list[str]) -> list[str]:
    """These of the models, in the order of `MODELS`. Raises `UserError` (2) for a name that none has."""
    for name in names:
        if name not in MODELS:
            raise UserError(f"no session model is called {name!r} (sbr.models); known: {', '.join(MODELS)}", USAGE)
    return [name for name in MODELS if name in names]
