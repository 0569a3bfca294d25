"""Trains and scores the session models of the literature: item vectors, scores by dot product, losses.

Each model is an encoder in a file of its own: a Module of (dim, max_prefix, dropout) whose forward maps the vectors of a session's items,
states (B, L, D), and their rows (B, L), padded on the right, to a session vector at each position, (B, L, D), which depends on no later
position. One that needs more than the session is a `SessionsEncoder`.

The vector of an item is learned for its id, or a learned projection of its exported vector ("on vectors"), or the sum of both, the usual
form of side information. A cold item has no id vector: a model without the exported vectors scores it below all others. `SequenceModel`
has the interface of `recommender.session_model.model.SessionModel` that training and evaluation use: losses (forward), `draw_known`,
`tables`, `scores`, `known`.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from recommender.session_model.losses import gbce, log_partition
from recommender.session_model.negative_sampling import Candidates
from recommender.session_model.windows import PAD

Encoder = Callable[[int, int, float], nn.Module]  # dim, max_prefix, dropout


class SessionsEncoder(nn.Module):
    """Base of an encoder that is told the training sessions, once, and in `forward` the vectors (N, D) of all items."""

    def read_sessions(self, rows: np.ndarray, offsets: np.ndarray, items: int) -> None:
        raise NotImplementedError


class SequenceModel(nn.Module):
    """Scores items with an encoder: `content` (N, C) is whitened, None: ids alone; `counts` (N,) are the items' training events, `sessions`
    the rows and offsets of the training sessions."""

    known: Tensor
    content: Tensor

    def __init__(
        self,
        encoder: Encoder,
        counts: np.ndarray,
        content: np.ndarray | None,
        ids: bool,
        dim: int,
        max_prefix: int,
        dropout: float,
        sessions: tuple[np.ndarray, np.ndarray],
    ) -> None:
        super().__init__()
        self.register_buffer("known", torch.as_tensor(counts > 0))
        self.ids = nn.Embedding(len(counts), dim) if ids else None
        self.project = None
        if self.ids is not None:
            nn.init.normal_(self.ids.weight, std=0.1)
        if content is not None:
            self.register_buffer("content", torch.as_tensor(content, dtype=torch.float32))
            self.project = nn.Linear(content.shape[1], dim, bias=False)
            nn.init.normal_(self.project.weight, std=0.1 / content.shape[1] ** 0.5)
        self.encoder = encoder(dim, max_prefix, dropout)
        if isinstance(self.encoder, SessionsEncoder):
            self.encoder.read_sessions(*sessions, len(counts))

    def forward(
        self, rows: Tensor, targets: Tensor, known: Tensor, candidates: Candidates, generator: torch.Generator, times: Tensor | None = None
    ) -> Tensor:
        """Computes the training losses (cases,) of windows (B, L) over the `candidates`; `times` (B, L) as in `Windows`."""
        torch.manual_seed(
            int(torch.randint(2**62, (), generator=generator))
        )  # the encoder's dropout depends on the step alone, so that a resumed training draws the same
        vectors, items, case = self.tables(), candidates.items, targets != PAD
        queries = self.encode(rows, vectors)[case]
        hidden = candidates.hidden(None if times is None else times[case], targets[case])
        if candidates.beta is not None:
            # each item starts with probability 1 / N: with 1/2 the first steps would only push all of them down (Lin et al., ICCV 2017)
            return gbce(queries @ vectors[items].T - math.log(len(self.known)), targets[case], candidates, hidden)
        return log_partition(queries, vectors[items], candidates.correction, hidden) - (queries * vectors[targets[case]]).sum(-1)

    def draw_known(self, generator: torch.Generator) -> Tensor:
        return self.known

    def tables(self) -> Tensor:
        """Computes the item vectors (N, D)."""
        vectors = torch.zeros((), device=self.known.device)
        if self.ids is not None:
            vectors = vectors + self.ids.weight * self.known[:, None]
        if self.project is not None:
            vectors = vectors + self.project(self.content)
        return vectors

    def encode(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Encodes windows rows (B, L) with the item vectors (N, D): session vectors (B, L, D)."""
        told = (vectors,) if isinstance(self.encoder, SessionsEncoder) else ()
        session_vectors: Tensor = self.encoder(vectors[rows.clamp(min=0)] * (rows != PAD)[..., None], rows, *told)
        return session_vectors

    def scores(self, rows: Tensor, tables: Tensor, cases: Tensor) -> Tensor:
        """Computes scores (cases, N) at the positions that `cases` (B, L) bool selects."""
        scores = self.encode(rows, tables)[cases] @ tables.T
        return scores if self.project is not None else scores.masked_fill(~self.known, -torch.inf)
