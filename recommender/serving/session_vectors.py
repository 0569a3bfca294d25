"""Encodes sessions into the query vectors of the session model's channels, and makes tables of them: `tpad recommend --vectors FILE`."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from recommender.session_model.numpy_model import NumpySessionModel


class SessionVectors(NamedTuple):
    """The vectors of one session, of its last L events whose items are in the catalogue, oldest first; L is 0 if there are none.

    A vector is the channel's query after its event and all before it: the last one stands for the whole session. Its direction is where
    the channel expects the next item among the item vectors, its length how surely. `weights` are the log-weights of the L queries in the
    mixture that scores the items after the last event."""

    rows: np.ndarray  # (L,) items
    queries: dict[str, np.ndarray]  # (L, D) float32 by channel, "content" and "id"
    weights: dict[str, np.ndarray]  # (L,) float32 by channel


def session_vectors(model: NumpySessionModel, session: list[int]) -> SessionVectors:
    """Encodes a session of rows by its last `max_prefix` events."""
    dim = model.channels.dim
    if not session:
        no_vectors = {name: np.empty((0, dim), np.float32) for name in model.vectors}
        return SessionVectors(np.empty(0, np.int64), no_vectors, {name: np.empty(0, np.float32) for name in model.vectors})
    state = model.encode(session)
    queries = {name: query[:, :dim].astype(np.float32) for name, query in state.queries.items()}  # without content's weight of cold items
    return SessionVectors(state.rows, queries, {name: state.weights[name].astype(np.float32) for name in queries})


def vectors_schema(model: NumpySessionModel) -> pa.Schema:
    """Returns the columns of the file: a line is an event of a session."""
    fields = [("session_id", pa.string()), ("position", pa.int32()), ("item_id", pa.string())]
    for name in model.vectors:
        fields += [(name, pa.list_(pa.float32(), model.channels.dim)), (f"{name}_weight", pa.float32())]
    return pa.schema(fields)


def vectors_table(model: NumpySessionModel, item_ids: pa.Array, names: list[str], sessions: list[list[int]]) -> pa.Table:
    """Returns the vectors of sessions of rows, whose ids are `names`. `position` counts the known events of a session from 1."""
    encoded = [session_vectors(model, session) for session in sessions]
    lengths = [len(vectors.rows) for vectors in encoded]
    last = np.repeat([len(session) for session in sessions], lengths)
    back = np.concatenate([np.arange(length, 0, -1) for length in lengths]) if lengths else np.empty(0, np.int64)
    columns = {
        "session_id": pa.array(names, pa.string()).take(pa.array(np.repeat(np.arange(len(names)), lengths))),
        "position": pa.array(last - back + 1, pa.int32()),
        "item_id": item_ids.take(pa.array(np.concatenate([vectors.rows for vectors in encoded]))),
    }
    for name in model.vectors:
        flat = pa.array(np.concatenate([vectors.queries[name].ravel() for vectors in encoded]))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, model.channels.dim)
        columns[f"{name}_weight"] = pa.array(np.concatenate([vectors.weights[name] for vectors in encoded]))
    return pa.table(columns, schema=vectors_schema(model))
