"""Probes item vectors without a session model: next-item retrieval, linear probes of attributes, CKA and CLUB between the halves.

All figures are on test sessions, or on items that a probe was not fitted on. Random draws are fixed, so equal vectors give equal figures.
"""

import copy

import numpy as np
import torch

from pipeline.data.catalog import Catalog
from pipeline.data.embeddings import Embeddings
from pipeline.objectives.mutual_information import CLUB, Gaussian
from recommender.metrics.evaluator import SCORES_AT_ONCE
from recommender.metrics.ranks import summarise, target_ranks
from recommender.session_model.windows import PAD, Windows, prefixes_of

HELD_OUT = 0.3  # share of the items
FEWEST = 20  # items for a figure of the dependence between the halves
FEW, ITEMS_A_VALUE = 50, 4  # an attribute that is probed has at most FEW values, and on average at least 4 items for each
RIDGE = 0.01  # regularisation of the probe, relative to the mean variance of a dimension
CRITIC_STEPS, CRITIC_EVERY, HIDDEN, RATE = 600, 25, 128, 2e-3
LEAST_LOG_VARIANCE = -2.0  # of q, as in training


def probe(embeddings: Embeddings, catalog: Catalog, attributes: list[str], test: Windows) -> dict[str, float]:
    """Returns name -> value: "retrieval HR@10 of whole", "accuracy of kind from knowledge", "CKA", "CLUB", ...

    `catalog` has the rows of `embeddings`; `attributes` are columns of it; `test` are the windows of the test sessions."""
    halves = embeddings.vectors
    parts = halves | {"whole": np.concatenate(list(halves.values()), axis=1)}
    figures: dict[str, float] = {}
    for name, vectors in parts.items():
        metrics = summarise(retrieval_ranks(vectors, test))
        figures |= {f"retrieval {metric} of {name}": metrics[metric] for metric in ("HR@10", "HR@20")}
        accuracies = {column: accuracy(vectors, [catalog.text(row, column) for row in range(len(catalog))]) for column in attributes}
        figures |= {f"accuracy of {column} from {name}": value for column, value in accuracies.items()}
        if accuracies:
            figures[f"accuracy from {name}"] = float(np.mean(list(accuracies.values())))
    if len(halves) == 2 and len(catalog) >= FEWEST:
        figures["CKA"] = linear_cka(*halves.values())
        figures["CLUB"] = club_a_dimension(halves["transition"], halves["knowledge"])
    return figures


def attribute_columns(catalog: Catalog, names: list[str] | None) -> list[str]:
    """Returns those of the columns `names` (None: all text columns) that have few values."""
    columns = catalog.columns if names is None else names
    values = {column: [text for row in range(len(catalog)) if (text := catalog.text(row, column))] for column in columns}
    return [column for column, texts in values.items() if 2 <= len(set(texts)) <= min(FEW, len(texts) // ITEMS_A_VALUE)]


def retrieval_ranks(vectors: np.ndarray, test: Windows) -> np.ndarray:
    """Returns (cases,) the rank of the target among all items but the last of the prefix, by cosine to that last item."""
    prefixes, targets = prefixes_of(test)
    last = prefixes[np.arange(len(prefixes)), (prefixes != PAD).sum(1) - 1]
    unit = torch.nn.functional.normalize(torch.as_tensor(vectors), dim=-1)
    ranks = []
    size = max(1, SCORES_AT_ONCE // len(vectors))
    for start in range(0, len(last), size):
        rows, wanted = (torch.as_tensor(items[start : start + size]).long() for items in (last, targets))
        scores = unit[rows] @ unit.T
        scores[torch.arange(len(rows)), rows] = -2.0  # the last item itself ranks last
        ranks.append(target_ranks(scores, wanted).numpy())
    return np.concatenate(ranks) if ranks else np.empty(0)


def split_items(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the rows at random into those to fit a probe on and those to test it on."""
    order = np.random.default_rng(0).permutation(count)
    held_out = max(1, round(HELD_OUT * count))
    return order[held_out:], order[:held_out]


def accuracy(vectors: np.ndarray, values: list[str]) -> float:
    """Returns the accuracy of a linear (ridge) probe of the vectors (N, D) on held-out items. Items without a value are left out."""
    labelled = np.flatnonzero([value != "" for value in values])
    _, label = np.unique(np.array(values)[labelled], return_inverse=True)
    fit, test = split_items(len(labelled))
    x = vectors[labelled].astype(np.float64)
    mean, target = x[fit].mean(0), np.eye(label.max() + 1)[label]
    centred, level = x[fit] - mean, target[fit].mean(0)
    spread = centred.T @ centred / len(fit)
    ridge = RIDGE * np.trace(spread) / len(spread) * np.eye(len(spread))
    weights = np.linalg.solve(spread + ridge, centred.T @ (target[fit] - level) / len(fit))
    return float((((x[test] - mean) @ weights + level).argmax(1) == label[test]).mean())


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the linear CKA of two sets of vectors (N, .): similarity up to rotation and scale, 0 to 1 (Kornblith et al.,
    arXiv 1905.00414)."""
    x, y = (z.astype(np.float64) - z.mean(0) for z in (x, y))
    norms = [float(np.linalg.norm(one.T @ other)) for one, other in ((y, x), (x, x), (y, y))]
    return norms[0] * norms[0] / max(norms[1] * norms[2], 1e-12)


def club_a_dimension(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the CLUB upper bound of I(x; y) in nats per dimension, of vectors (N, D) scaled to unit length.

    A critic is trained on part of the rows. Half of the held-out rows choose its best step, the other half give the bound."""
    fit, held_out = split_items(len(x))
    choose, test = np.array_split(held_out, 2)
    unit = [torch.nn.functional.normalize(torch.as_tensor(z), dim=-1) * z.shape[1] ** 0.5 for z in (x, y)]  # of unit variance
    parts = {name: (unit[0][rows], unit[1][rows]) for name, rows in (("fit", fit), ("choose", choose), ("test", test))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bound = CLUB(Gaussian(x.shape[1], y.shape[1], HIDDEN, LEAST_LOG_VARIANCE))
    optimizer = torch.optim.AdamW(bound.parameters(), RATE)
    best, state = float("inf"), copy.deepcopy(bound.state_dict())
    for step in range(CRITIC_STEPS):
        optimizer.zero_grad()
        bound.learning_loss(*parts["fit"]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % CRITIC_EVERY == 0:
            with torch.no_grad():
                loss = float(bound.learning_loss(*parts["choose"]))
            if loss < best:
                best, state = loss, copy.deepcopy(bound.state_dict())
    bound.load_state_dict(state)
    with torch.no_grad():
        return float(bound.estimate(*parts["test"]) / y.shape[1])
