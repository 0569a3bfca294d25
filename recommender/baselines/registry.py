"""Lists all baselines and session models by their names in `sbr.models` and in the tables.

To add a session model: a file with an encoder (see `sequence_model`), and a line of `ENCODERS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.core.errors import USAGE, UserError
from recommender.baselines.counts import Scorer, co_occurrence, last_item_repeat, popularity, session_popularity
from recommender.baselines.gru4rec import GRU4Rec
from recommender.baselines.narm import NARM
from recommender.baselines.nearest_sessions import session_knn, vector_knn
from recommender.baselines.sasrec import SASRec
from recommender.baselines.sequence_model import Encoder, SequenceModel
from recommender.baselines.sr_gnn import SRGNN
from recommender.session_model.model import SessionModel

ENCODERS: dict[str, Encoder] = {"GRU4Rec": GRU4Rec, "NARM": NARM, "SR-GNN": SRGNN, "SASRec": SASRec}


class Recipe(NamedTuple):
    encoder: Encoder | None  # of a SequenceModel; None: the SessionModel
    content: bool  # uses the exported vectors
    ids: bool  # uses item ids


MODELS = {  # in the order of training and of the tables: those of the literature, then the SessionModel's; full comes last
    **{name: Recipe(encoder, False, True) for name, encoder in ENCODERS.items()},
    **{f"{name} on vectors": Recipe(encoder, True, False) for name, encoder in ENCODERS.items()},
    **{f"{name} on ids and vectors": Recipe(encoder, True, True) for name, encoder in ENCODERS.items()},
    "ID-only": Recipe(None, False, True),
    "content-only": Recipe(None, True, False),
    "full": Recipe(None, True, True),
}

Model = SessionModel | SequenceModel


def chosen(names: list[str]) -> list[str]:
    """Sorts model names by the order of `MODELS`. Raises `UserError` (2) for an unknown name."""
    for name in names:
        if name not in MODELS:
            raise UserError(f"no session model is called {name!r} (sbr.models); known: {', '.join(MODELS)}", USAGE)
    return [name for name in MODELS if name in names]


BASELINES: dict[str, Callable[[np.ndarray, np.ndarray, int], Scorer]] = {  # name -> (rows, offsets of the training sessions, items)
    "popularity": lambda rows, offsets, items: popularity(rows, items),
    "S-POP": lambda rows, offsets, items: session_popularity(rows, items),
    "last-item repeat": lambda rows, offsets, items: last_item_repeat(rows, items),
    "co-occurrence": co_occurrence,
    "SKNN": session_knn,
    "VSKNN": vector_knn,
}
