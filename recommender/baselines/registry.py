"""Lists all baselines and session models by their names in `sbr.models` and in the tables.

To add a session model: a file with an encoder (see `sequence_model`), and a line of `ENCODERS`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pipeline.core.errors import USAGE, UserError
from pipeline.data.session_log import SessionLog
from recommender.baselines.counts import Scorer, co_occurrence, last_item_repeat, popularity, session_popularity
from recommender.baselines.esasrec import ESASRec
from recommender.baselines.gce_gnn import GCEGNN
from recommender.baselines.gru4rec import GRU4Rec
from recommender.baselines.hstu import HSTU
from recommender.baselines.narm import NARM
from recommender.baselines.nearest_sessions import sequential_filter_knn, session_knn, vector_knn
from recommender.baselines.ppmi import ppmi_knn
from recommender.baselines.sasrec import SASRec
from recommender.baselines.sequence_model import Encoder, SequenceModel
from recommender.baselines.sr_gnn import SRGNN
from recommender.baselines.stan import stan, vector_stan
from recommender.session_model.model import SessionModel

ENCODERS: dict[str, Encoder] = {
    "GRU4Rec": GRU4Rec,
    "NARM": NARM,
    "SR-GNN": SRGNN,
    "SASRec": SASRec,
    "eSASRec": ESASRec,
    "HSTU": HSTU,
    "GCE-GNN": GCEGNN,
}


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


class Baseline(NamedTuple):
    """A baseline of counts, and the settings that a search tries beside its own defaults."""

    build: Callable[..., Scorer]  # (rows, offsets of the training sessions, items, starts of the sessions, **settings)
    space: Mapping[str, tuple[float, ...]] = {}  # the defaults lie inside

    @property
    def defaults(self) -> dict[str, float]:
        """The default values of the settings in `space`."""
        parameters = inspect.signature(self.build).parameters
        return {key: parameters[key].default for key in self.space}


NEIGHBOURS = {"neighbours": (50, 100, 200, 500, 1000), "recent": (500, 1000, 2500, 5000, 10_000)}
DECAYS = {
    "position_decay": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),  # in steps
    "session_decay": (0.03, 0.1, 0.3, 1.0, 10.0),  # in lengths of the training period
    "item_decay": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
}
BASELINES = {
    "popularity": Baseline(popularity),
    "S-POP": Baseline(session_popularity),
    "last-item repeat": Baseline(last_item_repeat),
    "co-occurrence": Baseline(co_occurrence),
    "PPMI": Baseline(
        ppmi_knn, {"window": (1, 2, 3, 5, 10), "smoothing": (0.5, 0.75, 1.0), "damping": (1, 5, 20, 100), "decay": (0.3, 0.5, 0.7, 0.9)}
    ),
    "SKNN": Baseline(session_knn, NEIGHBOURS),
    "VSKNN": Baseline(vector_knn, NEIGHBOURS),
    "SFSKNN": Baseline(sequential_filter_knn, NEIGHBOURS),
    "STAN": Baseline(stan, NEIGHBOURS | DECAYS),
    "VSTAN": Baseline(
        vector_stan, NEIGHBOURS | DECAYS | {"shared_decay": (0.5, 1.0, 2.0, 4.0, 8.0, 16.0), "idf": (0.0, 0.3, 1.0, 3.0, 10.0)}
    ),
}


def build_baseline(name: str, log: SessionLog, items: int, settings: Mapping[str, float] | None = None) -> Scorer:
    """Builds a baseline from the training sessions; `settings` replace its defaults."""
    return BASELINES[name].build(log.rows, log.offsets, items, log.start, **(settings or {}))
