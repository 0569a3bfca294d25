"""Takes the pooled states of items from a server, like vLLM or text-embeddings-inference: `tpad export-embeddings --engine URL`.

The server runs the folder of `tpad export-model` and answers OpenAI's `/v1/embeddings`. An item without an image is sent as the token ids
of its prompt, so nothing depends on the server's tokenizer. One with an image is sent as a chat message, whose template the folder has.
The heads are applied here.
"""

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import ENVIRONMENT, UserError
from pipeline.export.item_batches import Batch, ItemBatches
from pipeline.mllm.model import Mllm, embed, summed_states

COMPARED = 256  # items on which server and local model must agree
LEAST_COSINE = 0.999
ATTEMPTS = 6  # the pauses between them double from a quarter of a second
TIMEOUT = 300.0  # seconds of a request
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses after which the same request may succeed


class EmbeddingServer:
    """A server at `url`, and the heads that are applied to what it gives. Threads may share it. Raises `UserError` (5)."""

    def __init__(self, url: str, mllm: Mllm, source: ItemBatches, halves: Sequence[str]) -> None:
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self.mllm, self.source, self.halves = mllm, source, halves
        processor = source.processor
        # how many tokens the mean of a server is over, and ours is not
        self.head = len(processor.head) if processor.config.pooling == "mean" else 0
        self.head_states = summed_states(mllm, processor.head) if self.head else torch.zeros(1)
        self.model = self._ask("models")["data"][0]["id"]

    def compare(self) -> None:
        """Raises `UserError` (5) unless the vectors of `COMPARED` items, or of all, are those of the local model."""
        rows = np.unique(np.linspace(0, len(self.source.catalog) - 1, COMPARED).astype(int))
        batch = self.source.load(rows, np.arange(len(rows)))
        theirs = self.vectors(rows[batch.positions], batch)
        sequences = [self.source.processor.encode(self.source.prompts.item(int(row))) for row in rows[batch.positions]]
        ours = embed(self.mllm, self.source.processor, sequences, self.halves, self.source.token_budget, "cpu")
        for half in self.halves:
            cosines = (theirs[f"items.{half}"].numpy() * ours[half]).sum(1)
            if not cosines.min() >= LEAST_COSINE:
                item = self.source.catalog.item_ids[rows[batch.positions[int(cosines.argmin())]]]
                fault = f"the server gives other vectors than the MLLM: {half} of item {item} has cosine {cosines.min():.4f}"
                raise self._refused(fault, "start it with the folder of `tpad export-model`, its pooling, and no normalising")

    def vectors(self, rows: np.ndarray, batch: Batch) -> dict[str, Tensor]:
        """Returns what `Mllm.forward` returns for the items `rows` (B,) of a loaded batch, on the CPU."""
        with torch.inference_mode():
            states, counts = self._states(rows, batch), torch.from_numpy(batch.n_tokens)[:, None]
            if self.head:  # those of the template's first tokens are the same for every item, since attention is causal
                states = (states * counts - self.head_states) / (counts - self.head)
            return {f"items.{half}": F.normalize(self.mllm.heads[half](states), dim=-1) for half in self.halves}

    def _states(self, rows: np.ndarray, batch: Batch) -> Tensor:
        ids = [line[:count].tolist() for line, count in zip(batch.tensors["items"]["input_ids"], batch.n_tokens, strict=True)]
        texts = np.flatnonzero(~batch.has_image)
        found: dict[int, list[float]] = {}
        if len(texts):
            found = dict(zip(texts.tolist(), self._embed({"input": [ids[n] for n in texts]}, len(texts)), strict=True))
        for n in np.flatnonzero(batch.has_image).tolist():
            (found[n],) = self._embed({"messages": [{"role": "user", "content": self._content(int(rows[n]), bool(batch.has_text[n]))}]}, 1)
        states = torch.tensor([found[n] for n in range(len(rows))])
        if states.shape[1] != (width := self.mllm.backbone.config.get_text_config().hidden_size):
            raise self._refused(f"the server gives {states.shape[1]} numbers, the MLLM's states have {width}", "serve its folder")
        if (states.norm(dim=1) - 1).abs().max() < 1e-3:
            if self.head:
                raise self._refused("the server gives vectors of length one, not the mean itself", "switch its normalising off")
            states = states * width**0.5  # about their length before; the heads' LayerNorm undoes the rest
        return states

    def _content(self, row: int, has_text: bool) -> list[dict[str, Any]]:
        """Returns an item with an image as the content of a chat message."""
        image = self.source.catalog.image_bytes(row)
        assert image is not None
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image;base64,{base64.b64encode(image).decode()}"}},
        ]
        if has_text:
            text, processor = self.source.prompts.text(row), self.source.processor
            if len(processor.tokens(" " + text)) > processor.config.max_text_tokens:
                text = str(processor.tokenizer.decode(processor.text(text))).removeprefix(" ")
            content.append({"type": "text", "text": text})
        return content

    def _embed(self, request: dict[str, Any], count: int) -> list[list[float]]:
        answer = self._ask("embeddings", {"model": self.model, "encoding_format": "float"} | request)
        try:
            vectors = [entry["embedding"] for entry in sorted(answer["data"], key=lambda entry: entry["index"])]
        except (KeyError, TypeError):
            raise self._refused("the server's answer has no embeddings", "give --engine one that has /v1/embeddings") from None
        if len(vectors) != count:
            raise self._refused(f"the server gives {len(vectors)} embeddings for {count} items", "give --engine another one")
        return vectors

    def _refused(self, fault: str, remedy: str) -> UserError:
        return UserError(f"{fault} ({self.url}); {remedy}", ENVIRONMENT)

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"content-type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(urllib.request.Request(f"{self.url}/{path}", data, headers), timeout=TIMEOUT) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                fault = f"{error.code}, {error.read(500).decode(errors='replace').strip()}"
                if error.code not in PASSING:
                    break
            except (OSError, ValueError) as error:  # no connection, a URL or an answer that is none
                fault = str(getattr(error, "reason", error)) or type(error).__name__
                if isinstance(error, ValueError):
                    break
            if attempt + 1 < ATTEMPTS:
                time.sleep(0.25 * 2**attempt)
        raise UserError(f"no answer from the server of embeddings: {fault} ({self.url}/{path}); give --engine the URL of one", ENVIRONMENT)
