"""One session against the session model, in numpy: what is run for every request that goes through the index.

The same arithmetic as `SessionModel.read` and `SessionModel.scores`, for one prefix and its last position alone, over a few items.
A session has some five items of 64 numbers, so that PyTorch would spend three quarters of the time on calling its operators, and
the service two seconds on importing it. A test holds the two to each other.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from recommender.session_model.config import LEAST_MASS, MAX_SCALE, NEVER, SEEN_RATE, ModelConfig

Arrays = Mapping[str, np.ndarray]

LEAST = -80.0  # of an item's logit: exp of what is less is no normal float32, and takes twenty times as long


class Read(NamedTuple):
    """What a session says after its last item."""

    rows: np.ndarray  # (L,) its items, oldest first
    queries: dict[str, np.ndarray]  # (L, D) by channel, the channel's scale in them
    weights: dict[str, np.ndarray]  # (L,) log-weights of each item's component, by channel and table of pairs
    others: np.ndarray  # (P,) the items themselves and those that stood by them in training, one as often as it did
    gains: np.ndarray  # (P,) what having stood there adds to exp(score) of each
    lost: np.ndarray  # (L,) the share of what all that gives it that an item loses for having been seen
    copied: np.ndarray  # (L,) what having been seen adds to exp(score) then
    new_items: float = 0.0  # log-odds added to items without training events


class Channels:
    """The model's channels as arrays, side by side (K, ...): one call of numpy serves them all.

    Layers that read the same are one matrix, and the graph's messages are in that of the cell that reads them.
    """

    def __init__(self, channels: Sequence[Arrays], dim: int) -> None:
        self.arrays = {name: np.stack([channel[name] for channel in channels]) for name in channels[0]}
        self.scale = np.minimum(np.exp(self.arrays["log_scale"]), MAX_SCALE)  # (K,)
        self.dim = dim
        self.graph, self.attention = "graph.gate" in self.arrays, "attention.recency" in self.arrays
        if self.graph:
            messages = np.split(self.arrays["graph.cell.weight_ih"], 2, axis=2)
            into, out_of = (of @ self.arrays[f"graph.{name}.weight"] for of, name in zip(messages, ("into", "out_of"), strict=True))
            self.gates = np.concatenate([into, out_of, self.arrays["graph.cell.weight_hh"]], 1).mT.copy()  # (K, D, 9 * D)
        layers = ["last", "weighed", *(["attention.ask", "attention.answer"] if self.attention else []), "merit"]
        self.layers = np.concatenate([self.arrays[f"{name}.weight"] for name in layers], 1).mT.copy()  # (K, D, 2 or 4 * D + 1)

    def read(self, states: np.ndarray, before: np.ndarray, after: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """states (K, L, D), before and after (L, L) as `transitions` gives them, back (L, L) -> queries (K, L, D), log-weights (K, L)."""
        dim, arrays = self.dim, self.arrays
        if self.graph:
            states = states + arrays["graph.gate"][:, None, None] * (self.cell(states, before, after) - states)
        found = states @ self.layers
        queries, weighed, merit = found[..., :dim], found[..., dim : 2 * dim], found[..., -1] + arrays["merit.bias"]
        if self.attention:
            ask, answer = found[..., 2 * dim : 3 * dim] + arrays["attention.ask.bias"][:, None], found[..., 3 * dim : 4 * dim]
            logits = np.where(back >= 0, ask @ answer.mT / dim**0.5 + arrays["attention.recency"][:, back], NEVER)
            weights = np.exp(logits - logits.max(2, keepdims=True))
            queries = queries + weights / weights.sum(2, keepdims=True) @ states @ arrays["attention.read.weight"].mT
        queries = queries * (self.scale[:, None, None] / np.maximum(np.linalg.norm(queries, axis=2, keepdims=True), 1e-12))
        weigh = states[:, -1:] @ arrays["weigh.weight"].mT + arrays["weigh.bias"][:, None]
        return queries, (weigh @ weighed.mT)[:, 0] / dim**0.5 + merit + arrays["weight_recency"][:, back[-1]]

    def cell(self, states: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """The gated recurrent unit over what the neighbours say."""
        dim, found = self.dim, states @ self.gates
        new = before @ found[..., : 3 * dim] + after @ found[..., 3 * dim : 6 * dim] + self.arrays["graph.cell.bias_ih"][:, None]
        old = found[..., 6 * dim :] + self.arrays["graph.cell.bias_hh"][:, None]
        gates = 0.5 + 0.5 * np.tanh(0.5 * (new[..., : 2 * dim] + old[..., : 2 * dim]))  # the logistic function
        candidate = np.tanh(new[..., 2 * dim :] + gates[..., :dim] * old[..., 2 * dim :])
        done: np.ndarray = candidate + gates[..., dim:] * (states - candidate)
        return done


class PairCounts:
    """A table of `Pairs`, with where each item's entries begin."""

    def __init__(self, pairs: Arrays) -> None:
        self.keys, self.counts, self.totals, self.distinct = (pairs[name] for name in ("keys", "counts", "totals", "distinct"))
        self.recency, self.evidence = pairs["recency"], pairs["evidence"]
        self.items = len(self.totals)
        self.begin = np.searchsorted(self.keys, np.arange(self.items + 1) * self.items)
        self.discount = 1 / (1 + float(np.exp(-pairs["discount"])))

    def weights(self, rows: np.ndarray, back: np.ndarray) -> np.ndarray:
        """(L,)"""
        total = self.totals[rows]
        trust = self.evidence[0] + self.evidence[1] * np.log(np.maximum(total, 1))
        return np.where(total < 1, NEVER, trust + self.recency[back])

    def others(self, rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every item that stood by one of `rows` (L,): its row, and its share times the log-weight's exp of that one; (P,) both."""
        begin = self.begin[rows]
        length = self.begin[rows + 1] - begin
        end = np.cumsum(length)
        entry = np.arange(end[-1]) + np.repeat(begin - end + length, length)
        share = np.maximum(self.counts[entry] - self.discount, 0) * np.repeat(np.exp(weights) / self.whole(rows), length)
        return self.keys[entry] - np.repeat(rows * self.items, length), share

    def shares(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The share of each of `items` (C,) among the others of each of `rows` (L,), (L, C)."""
        if not len(self.keys):
            return np.zeros((len(rows), len(items)), np.float32)
        keys = rows[:, None] * self.items + items
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        count = np.where(self.keys[place] == keys, self.counts[place], 0)
        found: np.ndarray = np.maximum(count - self.discount, 0) / self.whole(rows)[:, None]
        return found

    def whole(self, rows: np.ndarray) -> np.ndarray:
        """What a discounted count of each of `rows` (L,) is a share of."""
        found: np.ndarray = np.maximum(self.totals[rows] - self.discount * self.distinct[rows], 1e-6)
        return found


class Ranker:
    def __init__(self, config: ModelConfig, arrays: Arrays) -> None:
        """`arrays`: the `state_dict` of a `SessionModel`."""
        self.max_prefix, self.known = config.max_prefix, arrays["known"]
        self.stranger = arrays.get("stranger", np.zeros(3, np.float32))
        self.vectors, self.priors = tables(config, arrays)
        self.channels = Channels([below(arrays, f"channels.{name}") for name in self.vectors], config.dim)
        names = dict.fromkeys(key.split(".")[1] for key in arrays if key.startswith("pairs."))
        self.pairs = {name: PairCounts(below(arrays, f"pairs.{name}")) for name in names}
        self.copy, self.popular = arrays.get("copy"), float(arrays["popular"])
        self.lost = 0.5 + 0.5 * np.tanh(0.5 * SEEN_RATE * arrays["seen"]) if "seen" in arrays else None
        self.by_popularity = np.argsort(-self.priors["popular"], kind="stable")

    @classmethod
    def of(cls, model: Any) -> "Ranker":
        """Of a `SessionModel`, whose tensors it views: they may not change."""
        return cls(model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()})

    def read(self, session: list[int], new_items: float = 0.0) -> Read:
        """A session of rows, not empty, of which the model reads the last `max_prefix`. `new_items`: log-odds added to cold items."""
        rows = np.array(session[-self.max_prefix :])
        place = np.arange(len(rows))
        back = place[:, None] - place  # (L, L) below 0: not yet
        before, after = transitions(rows, back >= 0)
        states = np.stack([vectors.take(rows, 0)[:, : self.channels.dim] for vectors in self.vectors.values()])
        queries, weights = (dict(zip(self.vectors, found, strict=True)) for found in self.channels.read(states, before, after, back))
        if "content" in queries:
            to_stranger = np.where(self.known[rows, None], self.stranger[0], self.stranger[1])
            queries["content"] = np.concatenate([queries["content"], to_stranger], 1)
        if "id" in weights:
            weights["id"] = np.where(self.known[rows], weights["id"], NEVER)
        others, gains = [rows], [np.zeros(len(rows))]
        for name, pairs in self.pairs.items():
            weights[name] = pairs.weights(rows, back[-1])
            beside, share = pairs.others(rows, weights[name])
            others.append(beside)
            gains.append(share)
        copied = np.zeros(len(rows)) if self.copy is None else np.exp(self.copy[back[-1]])
        again = ((rows[:, None] == rows) & (back < 0)).any(1)  # of the events after it, one is of the same item
        lost = np.zeros(len(rows)) if self.lost is None else np.where(again, 0, self.lost[back[-1]])
        return Read(rows, queries, weights, np.concatenate(others), np.concatenate(gains), lost, copied, new_items)

    def scores(self, read: Read, items: np.ndarray) -> np.ndarray:
        """Of `items` (C,), ascending; (C,)."""
        total = np.exp(self.priors["popular"].take(items) + self.popular)
        for name in self.vectors:
            total += np.exp(read.weights[name]) @ self.channel(read, name, items)
        place, there = find(items, read.others)
        total += np.bincount(place[there], read.gains[there], len(items)).astype(total.dtype)
        place, there = find(items, read.rows)
        np.multiply.at(total, place[there], (1 - read.lost[there]).astype(total.dtype))
        np.add.at(total, place[there], read.copied[there].astype(total.dtype))
        found: np.ndarray = np.log(np.maximum(total, LEAST_MASS))
        if read.new_items:
            found += np.float32(read.new_items) * ~self.known[items]
        return found

    def channel(self, read: Read, name: str, items: np.ndarray) -> np.ndarray:
        """What each query of a channel gives each of `items` (C,), without its weight: (L, C)."""
        part: np.ndarray = read.queries[name] @ self.vectors[name].take(items, 0).T  # `take` of rows is thrice as fast as [items]
        part += self.priors[name].take(items)
        np.exp(np.maximum(part, LEAST, out=part), out=part)
        if name == "id":
            part *= self.known.take(items)
        return part

    def origins(self, read: Read, items: np.ndarray, shares: dict[str, np.ndarray]) -> np.ndarray:
        """Where the scores of `items` (C,), none of them the session's, come from, (L + 1, C): what the channels and the pairs
        of each of its items add to exp(score), and in the last line what popularity adds. `shares`: those of the pairs."""
        parts = np.zeros((len(read.rows) + 1, len(items)), np.float32)
        for name in self.vectors:
            parts[:-1] += np.exp(read.weights[name])[:, None] * self.channel(read, name, items)
        for name, share in shares.items():
            parts[:-1] += np.exp(read.weights[name])[:, None] * share
        parts[-1] = np.exp(self.priors["popular"][items] + self.popular)
        return parts

    def shares(self, read: Read, items: np.ndarray) -> dict[str, np.ndarray]:
        """By table of pairs the share of each of `items` (C,) among the others of each of the session's, (L, C)."""
        return {name: pairs.shares(read.rows, items) for name, pairs in self.pairs.items()}


def tables(config: ModelConfig, arrays: Arrays) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`SessionModel.tables` of all items: vectors (N, D) and priors (N,), by channel, and the priors "popular"."""
    known, expected = arrays["known"], arrays.get("expected", np.float32(0))
    share = arrays["belief"] + expected
    count = np.where(known, np.log(arrays["counts"] + np.exp(share)), share if config.hides_ids else expected)
    level = -float(np.log(max(int(known.sum()), 1)))
    vectors, priors = {}, {}
    popular = arrays.get("popularity", np.float32(0)) * count
    if "channels.content.log_scale" in arrays:
        vectors["content"] = np.concatenate([unit(arrays["content"] @ arrays["project.weight"].T), ~known[:, None]], 1, dtype=np.float32)
        priors["content"] = arrays.get("channels.content.popularity", np.float32(0)) * count + level
        popular = popular + arrays["stranger"][2] * ~known
    else:
        popular = np.where(known, popular, np.float32(NEVER))
    if "channels.id.log_scale" in arrays:
        vectors["id"] = unit(arrays["ids.weight"]) * known[:, None]
        prior = arrays.get("channels.id.popularity", np.float32(0)) * count + level
        priors["id"] = np.where(known, prior, np.float32(NEVER))
    top = popular[known].max(initial=NEVER)
    priors["popular"] = popular - (top + np.log(np.exp(popular[known] - top).sum()))
    return vectors, priors


def find(items: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the `rows` stand in `items` (C,), ascending, and which of them do."""
    place = np.minimum(np.searchsorted(items, rows), len(items) - 1)
    return place, items[place] == rows


def below(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    """Those of a module of the model, by their names in it."""
    return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}


def unit(vectors: np.ndarray) -> np.ndarray:
    """(N, D), each of length one, but for those that are zero."""
    found: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return found


def transitions(rows: np.ndarray, open_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`recommender.session_model.channel.transitions` of one session: rows (L,), open_ (L, L) bool -> (L, L) twice."""
    same = (rows[:, None] == rows) & open_
    before, after = np.zeros(same.shape, np.float32), np.zeros(same.shape, np.float32)
    before[:, :-1] = same[:, 1:]
    after[:, 1:] = same[:, :-1] & open_[:, 1:]
    return tuple(near / np.maximum(near.sum(1, keepdims=True), 1) for near in (before, after))  # type: ignore[return-value]
