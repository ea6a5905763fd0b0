"""A packed model whose ranks compute every batch together, and say so if they do not.

Every rank schedules for itself; the scheduler is deterministic, so all make the same batches. Before a batch
runs, rank 0's digest of it is compared with every other's: a rank that was about to compute something else
is named, instead of sums of unrelated numbers being taken for logits.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields

import torch
from torch import Tensor

from llm42c.capture.packed import KVCache, PackedInputs, PackedModel
from llm42c.parallel.ranks import Ranks


class LockstepModel:
    """`model` on several ranks (a :class:`~llm42c.capture.packed.PackedModel`). Raises RanksDifferError, and
    RankFailureError where a rank died or did not answer within the process group's timeout."""

    def __init__(self, model: PackedModel, ranks: Ranks) -> None:
        self.vocab_size = model.vocab_size
        self.max_position_embeddings = model.max_position_embeddings
        self.dtype: torch.dtype = model.dtype
        self.digest = model.digest
        self.dependence = model.dependence
        self._model = model
        self._ranks = ranks

    def new_kv_cache(self, num_pages: int, page_size: int) -> KVCache:
        return self._model.new_kv_cache(num_pages, page_size)

    def kv_bytes_per_page(self, page_size: int) -> int:
        """The same on all ranks."""
        mine = self._model.kv_bytes_per_page(page_size)
        self._ranks.require_same_number("the size of a KV page", mine)
        return mine

    def forward(self, inputs: PackedInputs, cache: KVCache) -> Tensor:
        """Logits [R, V], the same bits on every rank; each rank's cache holds its own heads."""
        self._ranks.require_same_number("the batch", batch_digest(self.digest, inputs))
        with self._ranks.watch("a forward pass"):
            return self._model.forward(inputs, cache)


def batch_digest(label: str, inputs: PackedInputs) -> int:
    """63 bits that differ for two batches (or graphs) that differ."""
    digest = hashlib.blake2b(label.encode(), digest_size=8)
    for field in fields(inputs):
        tensor = getattr(inputs, field.name)
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return int.from_bytes(digest.digest(), "little") >> 1
