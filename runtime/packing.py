"""From chunks of requests to the arrays of one packed batch. No torch call a token: numpy buffers, reused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from llm42c.capture.packed import PackedInputs
from llm42c.runtime.request import Lease, Request


class Packable(Protocol):
    """What the packer needs of a request; a probe's synthetic sequences have it too."""

    lease: Lease

    def token_slice(self, start: int, end: int) -> list[int]: ...


R = TypeVar("R", bound=Packable)


@dataclass(slots=True)
class Span(Generic[R]):
    """Positions [start, end) of one request's committed + proposed tokens; logits from `first_row` on."""

    request: R
    start: int
    end: int
    first_row: int  # in [start, end]; end = no logits
    audit: bool = False

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def num_rows(self) -> int:
        return self.end - self.first_row


Chunk: TypeAlias = "Span[Request]"


class Packer:
    """Packs chunks into arrays of fixed capacity. What `pack` returns is valid until the next `pack`."""

    def __init__(self, num_tokens: int, num_seqs: int, num_rows: int, max_pages: int, page_size: int) -> None:
        self._page_size = page_size
        self._ids = np.zeros(num_tokens, dtype=np.int64)
        self._positions = np.zeros(num_tokens, dtype=np.int64)
        self._slots = np.zeros(num_tokens, dtype=np.int64)
        self._rows = np.zeros(num_rows, dtype=np.int64)
        self._cu = np.zeros(num_seqs + 1, dtype=np.int32)
        self._kv_lens = np.zeros(num_seqs, dtype=np.int32)
        self._table = np.zeros((num_seqs, max_pages), dtype=np.int32)
        self._cu_t, self._kv_lens_t, self._table_t = map(
            torch.from_numpy, (self._cu, self._kv_lens, self._table)
        )
        self._views: dict[tuple[int, int], PackedInputs] = {}

    def pack(self, chunks: Sequence[Span[R]], num_tokens: int, num_rows: int) -> PackedInputs:
        """One batch, padded to `num_tokens` tokens, `num_rows` logits rows and all sequences."""
        size, at, row = self._page_size, 0, 0
        for s, chunk in enumerate(chunks):
            request, start, end = chunk.request, chunk.start, chunk.end
            self._cu[s] = at
            self._kv_lens[s] = end
            used = (end + size - 1) // size
            self._table[s, :used] = request.lease.block_row[:used]
            if end - start == 1:
                (self._ids[at],) = request.token_slice(start, end)
                self._positions[at] = start
                self._slots[at] = request.lease.pages[start // size] * size + start % size
            else:
                span = slice(at, at + end - start)
                positions = np.arange(start, end)
                self._ids[span] = request.token_slice(start, end)
                self._positions[span] = positions
                self._slots[span] = slots_of(request, positions, size)
            for p in range(chunk.first_row, end):
                self._rows[row] = at + p - start
                row += 1
            at += end - start
        self._cu[len(chunks) :] = at
        self._kv_lens[len(chunks) :] = 0
        self._ids[at:num_tokens] = 0
        self._positions[at:num_tokens] = 0
        self._slots[at:num_tokens] = -1
        self._rows[row:num_rows] = 0
        return self._view(num_tokens, num_rows)

    def _view(self, num_tokens: int, num_rows: int) -> PackedInputs:
        view = self._views.get((num_tokens, num_rows))
        if view is None:
            view = PackedInputs(
                input_ids=torch.from_numpy(self._ids[:num_tokens]),
                positions=torch.from_numpy(self._positions[:num_tokens]),
                slot_mapping=torch.from_numpy(self._slots[:num_tokens]),
                cu_seqlens_q=self._cu_t,
                kv_lens=self._kv_lens_t,
                block_table=self._table_t,
                logits_indices=torch.from_numpy(self._rows[:num_rows]),
            )
            self._views[num_tokens, num_rows] = view
        return view


def slots_of(request: Packable, positions: np.ndarray, page_size: int) -> np.ndarray:
    """Cache slots [N] int64 of `positions` [N]."""
    pages = request.lease.block_row[positions // page_size].astype(np.int64)
    return pages * page_size + positions % page_size
