"""SR-GNN (Wu et al., AAAI 2019) with the structure of its authors' code, written anew: what benchmarks/sbr.py measures against.

One sample a prefix. The graph of each is built in Python, batch by batch: its distinct items, two normalised adjacency matrices,
and where its events are among the items. Then one step of a gated GNN cell over both, soft attention with the last
item, and a softmax over all items, trained by Adam. Item 0 is padding, so rows are counted from 1.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn


def samples_of(rows: np.ndarray, offsets: np.ndarray, longest: int) -> tuple[list[list[int]], np.ndarray]:
    """Every prefix, cut to its last `longest` events, and what followed it, both counted from 1."""
    prefixes, targets = [], []
    for begin, end in itertools.pairwise(offsets):
        session = (rows[begin:end] + 1).tolist()
        for length in range(1, len(session)):
            prefixes.append(session[max(0, length - longest) : length])
            targets.append(session[length])
    return prefixes, np.array(targets)


def graphs(prefixes: list[list[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """items (B, M), adjacency in and out (B, M, 2M), alias of each event (B, L), mask (B, L)"""
    length = max(map(len, prefixes))
    padded = np.array([prefix + [0] * (length - len(prefix)) for prefix in prefixes])
    most = max(len(np.unique(line)) for line in padded)
    items, matrices, aliases = [], [], []
    for line in padded:
        node = np.unique(line)
        items.append(node.tolist() + [0] * (most - len(node)))
        adjacency = np.zeros((most, most))
        for place in range(length - 1):
            if line[place + 1] == 0:
                break
            adjacency[np.where(node == line[place])[0][0], np.where(node == line[place + 1])[0][0]] = 1
        into, out_of = adjacency.sum(0), adjacency.sum(1)
        into[into == 0] = 1
        out_of[out_of == 0] = 1
        matrices.append(np.concatenate([adjacency / into, adjacency.T / out_of]).T)
        aliases.append([np.where(node == event)[0][0] for event in line])
    return (
        torch.tensor(np.array(items)),
        torch.tensor(np.array(matrices), dtype=torch.float32),
        torch.tensor(np.array(aliases)),
        torch.tensor(padded != 0),
    )


class SRGNN(nn.Module):
    def __init__(self, items: int, dim: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Embedding(items + 1, dim)
        self.edge_in, self.edge_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.of_messages, self.of_states = nn.Linear(2 * dim, 3 * dim), nn.Linear(dim, 3 * dim)
        self.one, self.two, self.three = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 1, bias=False)
        self.transform = nn.Linear(2 * dim, dim)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def cell(self, adjacency: Tensor, states: Tensor) -> Tensor:
        nodes = states.shape[1]
        messages = torch.cat([adjacency[:, :, :nodes] @ self.edge_in(states), adjacency[:, :, nodes:] @ self.edge_out(states)], 2)
        reset_m, input_m, new_m = self.of_messages(messages).chunk(3, 2)
        reset_s, input_s, new_s = self.of_states(states).chunk(3, 2)
        gate = torch.sigmoid(input_m + input_s)
        new = torch.tanh(new_m + torch.sigmoid(reset_m + reset_s) * new_s)
        return new + gate * (states - new)

    def forward(self, prefixes: list[list[int]]) -> Tensor:
        """Scores of all items, (B, N)."""
        items, adjacency, alias, mask = (of.to(self.embedding.weight.device) for of in graphs(prefixes))
        states = self.cell(adjacency, self.embedding(items))
        events = states[torch.arange(len(alias))[:, None], alias]
        last = events[torch.arange(len(alias)), mask.sum(1) - 1]
        weight = self.three(torch.sigmoid(self.one(last)[:, None] + self.two(events)))
        read = (weight * events * mask[..., None]).sum(1)
        scores: Tensor = self.transform(torch.cat([read, last], 1)) @ self.embedding.weight[1:].T
        return scores
