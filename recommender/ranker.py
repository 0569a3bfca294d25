"""One session against the session model, in numpy: what is run for every request that goes through the index.

The same arithmetic as `SessionModel.read` and `SessionModel.scores`, for one prefix and its last position alone, over a few items.
A session has some five items of 64 numbers, so that PyTorch would spend three quarters of the time on calling its operators.
A test holds the two to each other. Arrays are views of the model's tensors: nothing is copied, nothing may change.
"""

from typing import NamedTuple

import numpy as np
import torch

from recommender.model import Channel, SessionModel, Tables
from recommender.pairs import NEVER, Pairs

LEAST = -80.0  # of an item's logit: exp of what is less is no normal float32, and takes twenty times as long


class Read(NamedTuple):
    """What a session says after its last item."""

    rows: np.ndarray  # (L,) its items, oldest first
    queries: dict[str, np.ndarray]  # (L, D) by channel, the channel's scale in them
    weights: dict[str, np.ndarray]  # (L,) log-weights of each item's component, by channel and table of pairs; also "copy"


class ChannelWeights:
    """A `Channel` as arrays."""

    def __init__(self, channel: Channel) -> None:
        self.arrays = {name: tensor.detach().numpy() for name, tensor in channel.state_dict().items()}
        self.scale = float(channel.log_scale.exp())
        self.dim = channel.dim

    def linear(self, name: str, states: np.ndarray) -> np.ndarray:
        found: np.ndarray = states @ self.arrays[f"{name}.weight"].T
        return found + self.arrays[f"{name}.bias"] if f"{name}.bias" in self.arrays else found

    def read(self, states: np.ndarray, before: np.ndarray, after: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """states (L, D), before and after (L, L) as `transitions` gives them, back (L, L) -> queries (L, D), log-weights (L,)."""
        if "graph.gate" in self.arrays:
            states = states + self.arrays["graph.gate"] * (self.cell(states, before, after) - states)
        queries = self.linear("last", states)
        if "attention.recency" in self.arrays:
            logits = self.linear("attention.ask", states) @ self.linear("attention.answer", states).T / self.dim**0.5
            logits = np.where(back >= 0, logits + self.arrays["attention.recency"][back], NEVER)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            queries = queries + self.linear("attention.read", weights / weights.sum(1, keepdims=True) @ states)
        queries *= self.scale / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
        weights = self.linear("weighed", states) @ self.linear("weigh", states[-1]) / self.dim**0.5
        return queries, weights + self.linear("merit", states)[:, 0] + self.arrays["weight_recency"][back[-1]]

    def cell(self, states: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """The gated recurrent unit over what the neighbours say."""
        said = np.concatenate([before @ self.linear("graph.into", states), after @ self.linear("graph.out_of", states)], 1)
        new = said @ self.arrays["graph.cell.weight_ih"].T + self.arrays["graph.cell.bias_ih"]
        old = states @ self.arrays["graph.cell.weight_hh"].T + self.arrays["graph.cell.bias_hh"]
        gates = 0.5 + 0.5 * np.tanh(0.5 * (new[:, : 2 * self.dim] + old[:, : 2 * self.dim]))  # the logistic function
        candidate = np.tanh(new[:, 2 * self.dim :] + gates[:, : self.dim] * old[:, 2 * self.dim :])
        found: np.ndarray = candidate + gates[:, self.dim :] * (states - candidate)
        return found


class PairCounts:
    """A table of `Pairs` as arrays, with where each item's entries begin."""

    def __init__(self, pairs: Pairs) -> None:
        self.items, self.keys, self.counts = pairs.items, pairs.keys.numpy(), pairs.counts.numpy()
        self.totals, self.distinct = pairs.totals.numpy(), pairs.distinct.numpy()
        self.begin = np.searchsorted(self.keys, np.arange(self.items + 1) * self.items)
        self.discount = float(pairs.discount.sigmoid())
        self.recency, self.evidence = pairs.recency.detach().numpy(), pairs.evidence.detach().numpy()

    def weights(self, rows: np.ndarray, back: np.ndarray) -> np.ndarray:
        """(L,)"""
        total = self.totals[rows]
        trust = self.evidence[0] + self.evidence[1] * np.log(np.maximum(total, 1))
        return np.where(total < 1, NEVER, trust + self.recency[back])

    def others(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every item that stood by one of `rows` (R,): its row, its share, and by which of the R; (P,) each."""
        begin, length = self.begin[rows], self.begin[rows + 1] - self.begin[rows]
        line = np.repeat(np.arange(len(rows)), length)
        entry = np.arange(len(line)) + np.repeat(begin - (np.cumsum(length) - length), length)
        source = rows[line]
        return self.keys[entry] - source.astype(np.int64) * self.items, self.share(self.counts[entry], source), line

    def shares(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The share of each of `items` (C,) among the others of each of `rows` (L,), (L, C)."""
        if not len(self.keys):
            return np.zeros((len(rows), len(items)), np.float32)
        keys = rows[:, None].astype(np.int64) * self.items + items
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return self.share(np.where(self.keys[place] == keys, self.counts[place], 0), rows[:, None])

    def share(self, count: np.ndarray, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.maximum(count - self.discount, 0) / np.maximum(self.totals[rows] - self.discount * self.distinct[rows], 1e-6)
        return found


class Ranker:
    def __init__(self, model: SessionModel, tables: Tables) -> None:
        with torch.inference_mode():
            self.max_prefix = model.config.max_prefix
            self.vectors = {name: vectors.detach().numpy() for name, vectors in tables.vectors.items()}
            self.priors = {name: prior.detach().numpy() for name, prior in tables.priors.items()}
            self.known = tables.known.numpy()
            self.channels = {name: ChannelWeights(model.channel(name)) for name in self.vectors}
            self.pairs = {name: PairCounts(pairs) for name, pairs in model.counted()}
            self.copy = None if model.copy is None else model.copy.detach().numpy()
            self.popular = float(model.popular)
        self.by_popularity = np.argsort(-self.priors["popular"], kind="stable")

    def read(self, session: list[int]) -> Read:
        """A session of rows, not empty, of which the model reads the last `max_prefix`."""
        rows = np.array(session[-self.max_prefix :])
        place = np.arange(len(rows))
        back = place[:, None] - place  # (L, L) below 0: not yet
        before, after = transitions(rows, back >= 0)
        queries, weights = {}, {}
        for name, channel in self.channels.items():
            queries[name], weights[name] = channel.read(self.vectors[name][rows], before, after, back)
        if "id" in weights:
            weights["id"] = np.where(self.known[rows], weights["id"], NEVER)
        for name, pairs in self.pairs.items():
            weights[name] = pairs.weights(rows, back[-1])
        weights["copy"] = np.full(len(rows), NEVER) if self.copy is None else self.copy[back[-1]]
        return Read(rows, queries, weights)

    def scores(self, read: Read, items: np.ndarray) -> np.ndarray:
        """Of `items` (C,), ascending; (C,)."""
        total = np.exp(self.priors["popular"][items] + self.popular)
        for name in self.channels:
            total += np.exp(read.weights[name]) @ self.channel(read, name, items)
        for name, pairs in self.pairs.items():
            others, shares, line = pairs.others(read.rows)
            _add(total, items, others, shares * np.exp(read.weights[name])[line])
        _add(total, items, read.rows, np.exp(read.weights["copy"]))
        with np.errstate(divide="ignore"):  # what no component can bring is at -inf
            found: np.ndarray = np.log(total)
        return found

    def channel(self, read: Read, name: str, items: np.ndarray) -> np.ndarray:
        """What each query of a channel gives each of `items` (C,), without its weight: (L, C)."""
        part: np.ndarray = read.queries[name] @ self.vectors[name][items].T
        part += self.priors[name][items]
        np.exp(np.maximum(part, LEAST, out=part), out=part)
        if name == "id":
            part *= self.known[items]
        return part

    def origins(self, read: Read, items: np.ndarray) -> np.ndarray:
        """Where the scores of `items` (C,), none of them the session's, come from, (L + 1, C): what the channels and the pairs
        of each of its items add to exp(score), and in the last line what popularity adds."""
        parts = np.zeros((len(read.rows), len(items)), np.float32)
        for name in self.channels:
            parts += np.exp(read.weights[name])[:, None] * self.channel(read, name, items)
        for name, pairs in self.pairs.items():
            parts += np.exp(read.weights[name])[:, None] * pairs.shares(read.rows, items)
        return np.concatenate([parts, np.exp(self.priors["popular"][items] + self.popular)[None]])

    def paired(self, rows: np.ndarray) -> list[np.ndarray]:
        """The items that stood by one of `rows` (L,) in training."""
        return [pairs.others(rows)[0] for pairs in self.pairs.values()]


def _add(total: np.ndarray, items: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
    """Adds the values of `rows` (P,) to those of `items` (C,), ascending, that they are."""
    place = np.minimum(np.searchsorted(items, rows), len(items) - 1)
    there = items[place] == rows
    total += np.bincount(place[there], values[there], len(items)).astype(total.dtype)


def transitions(rows: np.ndarray, open_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`recommender.model.transitions` of one session: rows (L,), open_ (L, L) bool -> (L, L) twice."""
    same = (rows[:, None] == rows) & open_
    before, after = np.zeros(same.shape, np.float32), np.zeros(same.shape, np.float32)
    before[:, :-1] = same[:, 1:]
    after[:, 1:] = same[:, :-1] & open_[:, 1:]
    return tuple(near / np.maximum(near.sum(1, keepdims=True), 1) for near in (before, after))  # type: ignore[return-value]
