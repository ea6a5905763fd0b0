"""The contract between the compiled model and the runtime: one packed ragged batch in, logits out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass
class PackedInputs:
    """One packed ragged batch: T tokens of S sequences, R rows whose logits are wanted.

    Row i of sequence s stands at position `kv_lens[s] - q_len[s] + i`. Rows at or after `cu_seqlens_q[-1]`
    are padding. A sequence may have `q_len` 0; its `kv_lens` and `block_table` row are then meaningless.
    """

    input_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64: page_id * page_size + offset; -1 = padding, writes nothing
    cu_seqlens_q: Tensor  # [S+1] int32
    kv_lens: Tensor  # [S] int32: total length including this call's tokens
    block_table: Tensor  # [S, P] int32
    logits_indices: Tensor  # [R] int64: rows whose logits are wanted

    def to(self, device: torch.device) -> PackedInputs:
        """The same batch there; tensors that are there already are not copied."""
        return PackedInputs(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass
class KVCache:
    """Paged key/value storage, one tensor a layer."""

    k: list[Tensor]  # each [num_pages, num_kv_heads, head_dim, page_size]
    v: list[Tensor]  # each [num_pages, num_kv_heads, page_size, head_dim]


@runtime_checkable
class PackedModel(Protocol):
    """One compiled callable on packed batches."""

    vocab_size: int
    max_position_embeddings: int
    dtype: torch.dtype
    digest: str  # of the compiled graph
    dependence: str | None  # why a row's bits may depend on its batch; None: by construction they do not

    def new_kv_cache(self, num_pages: int, page_size: int) -> KVCache:
        """Allocate storage for `num_pages` pages."""
        ...

    def kv_bytes_per_page(self, page_size: int) -> int:
        """Bytes of one page over all layers, keys and values together."""
        ...

    def forward(self, inputs: PackedInputs, cache: KVCache) -> Tensor:
        """Write K/V of every non-padding row, return logits [R, V]."""
        ...
