"""What the session models of the literature share: item vectors, scores by dot product, the losses.

Each is an encoder, in a file beside this one: a Module of (dim, max_prefix, dropout) whose forward takes the vectors of a
session's items, states (B, L, D), and their rows (B, L), padded on the right, to a session vector at each position, (B, L, D),
that reads no later position.

Items have a vector learned for their id, or a learned projection of the exported one ("on vectors"), or the sum of both, which is
how such models are usually given side information. An item without training events has no id vector: where nothing
else is read it scores below all others. `SequenceModel` answers what training and evaluation ask of a session model, as
`recommender.session_model.model.SessionModel` does: losses (forward), `draw_known`, `tables`, `scores`, `known`.
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


class SequenceModel(nn.Module):
    """`content` (N, C) is whitened already, None: ids alone; `counts` (N,) are the items' training events."""

    known: Tensor
    content: Tensor

    def __init__(
        self, encoder: Encoder, counts: np.ndarray, content: np.ndarray | None, ids: bool, dim: int, max_prefix: int, dropout: float
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

    def forward(
        self, rows: Tensor, targets: Tensor, known: Tensor, candidates: Candidates, generator: torch.Generator, times: Tensor | None = None
    ) -> Tensor:
        """The training losses of (B, L) windows among the `candidates`, (cases,). `times` (B, L) as in `Windows`."""
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # the encoder's dropout: by the step, not by what came before
        vectors, items, case = self.tables(), candidates.items, targets != PAD
        queries = self.encode(rows, vectors)[case]
        hidden = candidates.hidden(None if times is None else times[case], targets[case])
        if candidates.beta is not None:
            # each item begins with a chance of 1 in N, not of 1/2, which would push all of them away at first (Lin et al., ICCV 2017)
            return gbce(queries @ vectors[items].T - math.log(len(self.known)), targets[case], candidates, hidden)
        return log_partition(queries, vectors[items], candidates.correction, hidden) - (queries * vectors[targets[case]]).sum(-1)

    def draw_known(self, generator: torch.Generator) -> Tensor:
        return self.known

    def tables(self) -> Tensor:
        """Item vectors, (N, D)."""
        vectors = torch.zeros((), device=self.known.device)
        if self.ids is not None:
            vectors = vectors + self.ids.weight * self.known[:, None]
        if self.project is not None:
            vectors = vectors + self.project(self.content)
        return vectors

    def encode(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """rows (B, L), vectors (N, D) -> session vectors (B, L, D)"""
        found: Tensor = self.encoder(vectors[rows.clamp(min=0)] * (rows != PAD)[..., None], rows)
        return found

    def scores(self, rows: Tensor, tables: Tensor, cases: Tensor) -> Tensor:
        """Scores (cases, N) for the positions where `cases` (B, L) holds."""
        scores = self.encode(rows, tables)[cases] @ tables.T
        return scores if self.project is not None else scores.masked_fill(~self.known, -torch.inf)
